"""What all rivals are measured on, and what those that calibrate may see: bitpolicy's own disjoint split.

`samples.json` lists (prompt, seed) of each part and the pipeline call; `calls.safetensors` holds denoiser calls of the
reference's calibration trajectories for tools that want data: latents, timesteps, text states, the noise predicted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from bitpolicy.plan import Plan, make_plan
from bitpolicy.settings import Settings

HELD_OUT = 256


def bundled_plan(formats: tuple[str, ...] = ("int4", "int8", "fp16"), **parts: Any) -> Plan:
    """The bundled pipeline with the split of this comparison."""
    return make_plan(Settings(budget="100%", formats=formats, held_out_samples=HELD_OUT, **parts))


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
