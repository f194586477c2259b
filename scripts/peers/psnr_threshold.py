"""Apple's method: each layer gets the fewest bits that keep the PSNR above a common threshold, with only it quantized.

    psnr(l, f) = mean over prompts of 20 log10(max |x| / rms(x(l, f) - x)),   f(l) = min {f : psnr(l, f) > threshold}

x are the latents of a pipeline call with a single denoising step, which their script uses to save time
(apple/ml-stable-diffusion, python_coreml_stable_diffusion/mixed_bit_compression_pre_analysis.py at 11ba3a0, `run_pipe`
and `build_recipe`; also with 8 prompts). It leaves layers of 100,000 weights or fewer unquantized. The threshold is
swept until the bytes fit. The method does not weigh a layer's benefit against its bytes, as the knapsack does. The same
rule is also applied to the final latents of whole sampling loops.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bitpolicy.kernels.formats.format import Format
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.workflow.plan import Plan

PROMPTS, LARGE = 8, 100_000  # their number of prompts, and the most weights of a layer that stays FP16


def one_step_psnr(plan: Plan, work: Path, calibration: Calibration, ours: SensitivityTable) -> np.ndarray:
    """psnr(l, f) after a single denoising step, dB, float64, shape (L, F); infinite for FP16.

    Args:
        work: folder that stores the finished numbers.
        ours: gives the bias of a layer in a format, as for all assignments.
    """
    kept = work / "one-step-psnr.npy"
    if kept.is_file():
        return np.load(kept)
    once = Trajectories(plan.source.pipe, plan.source.components, {**plan.trajectories.call, "num_inference_steps": 1})
    samples = plan.split.calibration[:PROMPTS]
    once.batch = PROMPTS
    exact = torch.stack([*once.latents(samples)])
    found = np.full((len(plan.layers), len(plan.formats)), np.inf)
    for i, layer in enumerate(plan.layers):
        for j, format in enumerate(plan.formats):
            if format.packed:
                choice = {layer.name: ours.choice(i, format)}
                with quantized(
                    plan.trajectories.denoisers[0],
                    choice,
                    quantization=Quantization(calibration=calibration, storage=plan.source.storage),
                ):
                    found[i, j] = _psnr(torch.stack([*once.latents(samples)]), exact)
    np.save(kept, found)
    return found


def _psnr(changed: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean over samples, dB."""
    peak = exact.flatten(1).abs().amax(1).double()
    rms = (changed - exact).double().flatten(1).square().mean(1).sqrt()
    return float((20 * (peak / rms).log10()).mean())


def final_psnr(plan: Plan, truth: SensitivityTable) -> np.ndarray:
    """The same for whole sampling loops, up to a constant, from relative errors of the final latent."""
    errors = np.array([[truth.score(i, f) for f in plan.formats] for i in range(len(plan.layers))])
    with np.errstate(divide="ignore"):
        return -10 * np.log10(errors)


def thresholded(plan: Plan, psnr: np.ndarray, share: float, least: int = 0) -> dict[str, Format] | None:
    """Each layer's smallest format above a threshold, at the highest threshold that fits; None if none does.

    Args:
        psnr: dB, shape (L, F), infinite for FP16.
        share: the budget as a share of FP16.
        least: layers of this many weights or fewer stay FP16.
    """
    sizes = np.array([[plan.account.layer(layer.name, f) for f in plan.formats] for layer in plan.layers])
    small = np.array([np.prod(layer.shape) <= least for layer in plan.layers])
    psnr = np.where(small[:, None] & np.isfinite(psnr), -np.inf, psnr)
    budget, layers = share * plan.account.reference - plan.account.fixed, np.arange(len(sizes))
    for threshold in sorted({*psnr[np.isfinite(psnr)].tolist()}, reverse=True):
        chosen = np.where(psnr >= threshold, sizes, np.iinfo(np.int64).max).argmin(1)
        if sizes[layers, chosen].sum() <= budget:
            return {layer.name: plan.formats[f] for layer, f in zip(plan.layers, chosen, strict=True)}
    return None
