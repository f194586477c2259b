"""What quantizing one layer does to one call of the denoiser, which is how MixDQ ranks layers.

The denoiser, with one layer quantized, gets the reference's own latents at a few timesteps. The score is the power of
the change of its output relative to the power of the output (1 / SQNR), averaged over calls. It ignores what the
sampler does with the change. Source: Zhao et al. 2024, "MixDQ", section 3.2. They first use SSIM to separate layers
that affect content from layers that affect quality. A score of single calls cannot do that, because it does not use
finished images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peers.own_model import call
from safetensors.torch import load_file

from bitpolicy.policies.apply import quantized
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.table_files import ModelContext, read_table, write_table
from bitpolicy.workflow.plan import Plan

TIMESTEPS = (0.05, 0.35, 0.65, 0.95)  # positions on a trajectory: steps 1, 7, 13 and 19 of the bundled pipeline's 20
SAMPLES = 4


def one_step_table(plan: Plan, work: Path, calibration: Calibration) -> SensitivityTable:
    """Scores of every layer in every packed format, with the better of the two biases.

    Args:
        work: contains `calls.safetensors`; the finished table is stored in its `one-step/`.
    """
    if (work / "one-step" / "sensitivity.safetensors").is_file():
        return read_table(work / "one-step" / "sensitivity.safetensors")
    packed = [format for format in plan.formats if format.packed]
    calls = some_calls(work, plan.trajectories.call["num_inference_steps"])
    exact = outputs(plan.trajectories.denoisers[0], calls)
    power = float(exact.square().mean())
    error = torch.zeros(2, len(plan.layers), len(packed), dtype=torch.float64)
    for i, layer in enumerate(plan.layers):
        for j, format in enumerate(packed):
            for corrected in range(1 + layer.has_bias):
                choice = {layer.name: Choice(format, bool(corrected))}
                with quantized(
                    plan.trajectories.denoisers[0],
                    choice,
                    quantization=Quantization(calibration=calibration, storage=plan.source.storage),
                ):
                    changed = outputs(plan.trajectories.denoisers[0], calls)
                error[corrected, i, j] = float((changed - exact).double().square().mean()) / power
            if not layer.has_bias:
                error[1, i, j] = error[0, i, j]
    names = tuple(layer.name for layer in plan.layers)
    table = SensitivityTable("stepwise", names, tuple(packed), error.amin(0), error[1] <= error[0])
    (work / "one-step").mkdir(exist_ok=True)
    write_table(table, work / "one-step", ModelContext(plan.layers, plan.account, "one step"))
    return table


def some_calls(work: Path, steps: int) -> dict[str, torch.Tensor]:
    """Calls of the first samples at `TIMESTEPS`, conditional and unconditional."""
    calls = load_file(work / "calls.safetensors")
    order = calls["timestep"].unique().flip(0)  # the first step has the largest timestep
    assert len(order) == steps
    rows = [torch.where(calls["timestep"] == order[int(place * steps)])[0] for place in TIMESTEPS]
    return {key: value[torch.cat([_spread(r) for r in rows])] for key, value in calls.items()}


def _spread(rows: torch.Tensor) -> torch.Tensor:
    """`2 SAMPLES` rows of one step, evenly spread."""
    return rows[torch.linspace(0, len(rows) - 1, 2 * SAMPLES).long()]


def outputs(denoiser: Any, calls: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The denoiser's output for each call."""
    with torch.no_grad():
        return call(denoiser, calls)
