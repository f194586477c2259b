"""The implementation of `bitpolicy inspect --kernels`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bitpolicy.api import load_pipeline
from bitpolicy.cli.command_options import InspectOptions
from bitpolicy.kernel_choices import watching
from bitpolicy.kernels.compute.setting import resident_bytes, set_compute
from bitpolicy.pipelines.loading import DTYPES, device_named, packed_components
from bitpolicy.pipelines.prompting import default_requests, load_requests
from bitpolicy.policies.components import asked_components
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.workflow.plan import short_call


def kernels_in_use(options: InspectOptions, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Draw one image with a checkpoint to see which kernels its layers use."""
    device = device_named(options.device)
    dtype = DTYPES.get(options.dtype) or (torch.float32 if device.type == "cpu" else None)
    pipe = load_pipeline(folder, dtype, device)
    target = Target.chosen(pipe, asked_components(options.component) or packed_components(folder))
    if options.compute is not None or options.low_memory:
        set_compute(target, options.compute, options.low_memory)
    asked = load_requests(options.prompts) if options.prompts else default_requests(pipe, bundled=False)
    sample = Sample.of(asked[0], 0)
    trajectories = Trajectories(pipe, target.names, {**short_call(pipe), **options.arguments})
    trajectories.learn(sample)
    with watching(target) as seen:
        next(trajectories.images([sample]))
    held = [resident_bytes(model) for model in target.models]
    stored, layouts = sum(part.stored for part in held), sum(part.layouts for part in held)
    title = (
        f"{folder}: {len(seen)} packed layers on {device}; {stored:,} bytes as stored, "
        f"{layouts:,} bytes of layouts that kernels prepared"
    )
    return [choice.as_row() for choice in seen.values()], title
