"""The ablation probe: quantize one layer, run the real trajectory, measure.

It is the truth that other probes are checked against.

error(l, f) = E|x_0(Q_f(W_l)) - x_0|^2 / E|x_0|^2, once with the plain and, where there is a bias, once with the
corrected bias; it costs (layers x formats x biases) trajectories a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitpolicy.kernels.format import Format
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.policy import Choice
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.trajectory import Sample, Trajectories


def ablate(
    trajectories: Trajectories,
    layer: Layer,
    formats: Sequence[Format],
    calibration: Calibration,
    storage: torch.dtype,
    samples: Sequence[Sample],
    reference: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Mean |dx_0|^2 of one layer, not yet divided by the latents' power.

    Args:
        reference: the unquantized final latent of each sample, from `Trajectories.latents`.

    Returns:
        float64, shape (2, formats): with the bias as it was, and corrected (the same numbers where there is no bias).
    """
    result = torch.zeros(2, len(formats), dtype=torch.float64)
    for row, correct in enumerate((False, True) if layer.has_bias else (False,)):
        for column, format in enumerate(formats):
            with quantized(trajectories.denoiser, {layer.name: Choice(format, correct)}, calibration, storage):
                latents = zip(trajectories.latents(samples), reference, strict=True)
                errors = [(latent - x).double().square().sum() for latent, x in latents]
            result[row, column] = torch.stack(errors).mean()
    if not layer.has_bias:
        result[1] = result[0]
    return result
