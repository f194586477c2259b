"""What all rivals are measured on, and what those that calibrate may see.

Calibration and search samples are bitpolicy's own split of the bundled pipeline's 32 prompts: 16 and 8 of them. What
everything is measured on is longer than the 8 that are left, for an interval over prompts is only as good as their
number: `held_out.txt`, 32 names drawn at random (`random.Random(0)`) from those of the 359 emoji that the pipeline was
trained on, leaving out every emoji with a name among the bundled prompts. So the prompts are ones that the model knows,
and no calibration, search or choice of settings saw one of them.

`samples.json` lists (prompt, seed) of each part and the pipeline call; `calls.safetensors` holds denoiser calls of the
reference's calibration trajectories for tools that want data: latents, timesteps, text states, the noise predicted.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from bitpolicy.sensitivity.samples import Sample, split_samples
from bitpolicy.settings import Settings
from bitpolicy.workflow.plan import Plan, make_plan

HELD_OUT = 256  # images: eight of each prompt
_PROMPTS, _FIRST_SEED = Path(__file__).with_name("held_out.txt"), 3_000_000  # other parts' seeds are below


def bundled_plan(formats: tuple[str, ...] = ("int4", "int8", "fp16"), **parts: Any) -> Plan:
    """The bundled pipeline with the split of this comparison.

    Raises:
        ValueError: a held-out prompt is one of the pipeline's own.
    """
    plan = make_plan(Settings(budget="100%", formats=formats, **parts))
    return replace(plan, split=replace(plan.split, held_out=held_out(plan)))


def held_out(plan: Plan, prompts: Path = _PROMPTS) -> tuple[Sample, ...]:
    """The prompts in turn, each time with another seed, so that the first few images show many prompts."""
    names = prompts.read_text(encoding="utf-8").splitlines()
    seen = {
        sample.prompt for part in (plan.split.calibration, plan.split.search, plan.split.confirm) for sample in part
    }
    if known := sorted(seen & {*names}):
        raise ValueError(f"{prompts.name} has {', '.join(known)}, which calibration or search see; take it out")
    return tuple(split_samples(names, HELD_OUT, _FIRST_SEED))


def write_samples(plan: Plan, work: Path, trajectories: int = 16) -> None:
    """Write both files.

    Args:
        trajectories: calibration samples whose every denoiser call is kept.
    """
    work.mkdir(parents=True, exist_ok=True)
    parts = {part: getattr(plan.split, part) for part in ("calibration", "search", "confirm", "held_out")}
    listed = {part: [(sample.prompt, sample.seed) for sample in samples] for part, samples in parts.items()}
    text = json.dumps({**listed, "call": plan.trajectories.call, "fp16_bytes": plan.account.reference}, indent=1)
    (work / "samples.json").write_text(text + "\n")
    calls: list[dict[str, torch.Tensor]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        latents, timestep = args
        states = kwargs["encoder_hidden_states"]
        noise = output[0] if isinstance(output, tuple) else output.sample
        steps = torch.as_tensor(timestep).expand(len(latents))
        calls.append({"latents": latents, "timestep": steps, "states": states, "noise": noise})

    handle = plan.source.denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        for _ in plan.trajectories.latents(plan.split.calibration[:trajectories]):
            pass
    finally:
        handle.remove()
    save_file(
        {key: torch.cat([call[key] for call in calls]).contiguous() for key in calls[0]}, work / "calls.safetensors"
    )
