"""The samples that all rivals are measured on, and those that calibrating tools may see.

For the bundled pipeline, the calibration and search samples are bitpolicy's own split of its 32 prompts: 16 and 8 of
them. The remaining 8 are too few for the measurement, because an interval over prompts is only as good as their number.
It uses `held_out.txt` instead: 32 names drawn at random (`random.Random(0)`) from the names of the 359 emoji that the
pipeline was trained on, without any emoji that has a name among the bundled prompts. So the model knows these prompts,
but no calibration, search or choice of settings saw one of them.

For the models in scripts/trained, the 32 prompts are captions drawn as in training. The measurement uses captions with
combinations that never occur in training, each of them once.

`samples.json` lists the (prompt, seed) pairs of each part, the pipeline call and the layers that people usually leave
unquantized. `calls.safetensors` stores denoiser calls of the reference's calibration trajectories for tools that need
data: every tensor argument of the denoiser under its name, and the output.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmark_policies import usually_kept
from peers.entry import MODEL
from peers.own_model import OUTPUT
from safetensors.torch import save_file
from scene_judge import shipped_judge, shown
from scenes import draw_scene, unseen_captions
from shipped_models import CALLS
from torch import nn

from bitpolicy.sensitivity.samples import Sample, split_samples
from bitpolicy.settings import Settings
from bitpolicy.workflow.plan import Plan, make_plan

HELD_OUT = 256  # images: eight per prompt of the bundled pipeline, or one per caption
_OWN_PROMPTS = 32
_PROMPTS, _FIRST_SEED = Path(__file__).with_name("held_out.txt"), 3_000_000  # the seeds of other parts are smaller


def plan_of(model: Path = MODEL, formats: tuple[str, ...] = ("int4", "int8", "fp16")) -> Plan:
    """The plan of a pipeline with the split of this comparison.

    Args:
        model: the bundled pipeline, or a folder in scripts/trained.

    Raises:
        ValueError: a held-out prompt is one of the pipeline's own.
    """
    if model == MODEL:
        plan = make_plan(Settings(budget="100%", formats=formats))
        names = _PROMPTS.read_text(encoding="utf-8").splitlines()
    else:
        call = tuple(sorted(CALLS[model.name].items()))
        captions = drawn_captions(_OWN_PROMPTS)
        plan = make_plan(Settings(budget="100%", formats=formats, model=str(model), prompts=captions, call=call))
        names = [scene.caption for scene in unseen_captions(HELD_OUT)]
    return replace(plan, split=replace(plan.split, held_out=held_out(plan, names)))


def drawn_captions(count: int) -> tuple[str, ...]:
    """Distinct captions of the training set, the same ones each time."""
    stream, found = random.Random(23), dict[str, None]()
    while len(found) < count:
        found[draw_scene(stream).caption] = None
    return tuple(found)


def captions_shown(prompts: Sequence[str], images: torch.Tensor) -> list[bool] | None:
    """Whether each image shows its held-out caption; None if the prompts are not captions of scenes.

    Args:
        prompts: of the images, or more.
        images: float32 in [0, 1], shape (B, 3, 64, 64).
    """
    scenes = {scene.caption: scene for scene in unseen_captions(HELD_OUT)}
    asked = prompts[: len(images)]
    if any(prompt not in scenes for prompt in asked):
        return None
    return shown(shipped_judge(), images * 2 - 1, [scenes[prompt] for prompt in asked])


def held_out(plan: Plan, names: list[str]) -> tuple[Sample, ...]:
    """The prompts in turn, each time with another seed, so that the first few images show many prompts."""
    seen = {
        sample.prompt for part in (plan.split.calibration, plan.split.search, plan.split.confirm) for sample in part
    }
    if known := sorted(seen & {*names}):
        raise ValueError(f"{', '.join(known)}: held-out prompts that calibration or search use; remove them")
    return tuple(split_samples(names, HELD_OUT, _FIRST_SEED))


def write_samples(plan: Plan, work: Path, trajectories: int = 16) -> None:
    """Write both files.

    Args:
        trajectories: number of calibration samples whose denoiser calls are all stored.
    """
    work.mkdir(parents=True, exist_ok=True)
    parts = {part: getattr(plan.split, part) for part in ("calibration", "search", "confirm", "held_out")}
    listed = {part: [(sample.prompt, sample.seed) for sample in samples] for part, samples in parts.items()}
    about = {"call": plan.trajectories.call, "fp16_bytes": plan.account.reference, "kept": usually_kept(plan)}
    (work / "samples.json").write_text(json.dumps({**listed, **about}, indent=1) + "\n")
    calls: list[dict[str, torch.Tensor]] = []
    denoiser = plan.trajectories.denoisers[0]
    signature = inspect.signature(type(denoiser).forward)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = {n: v for n, v in signature.bind(module, *args, **kwargs).arguments.items() if torch.is_tensor(v)}
        given[OUTPUT] = output[0] if isinstance(output, tuple) else output.sample
        rows = len(given[OUTPUT])
        calls.append({name: v.expand(rows) if v.ndim < 1 or len(v) != rows else v for name, v in given.items()})

    handle = denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        for _ in plan.trajectories.latents(plan.split.calibration[:trajectories]):
            pass
    finally:
        handle.remove()
    joined = {name: torch.cat([one[name] for one in calls]).contiguous() for name in calls[0]}
    save_file(joined, work / "calls.safetensors")
