"""The data-free probe: |Q(W) - W|^2 / |W|^2 of each layer. For when nothing can be run; it says little about images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import HasModules, quantizable_layers
from bitpolicy.policies.apply import stored_weight
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.rounded_layers import multiplied_weight
from bitpolicy.sensitivity.rounding.candidates import Candidate


def weight_errors(
    model: HasModules,
    candidates: Sequence[Candidate],
    storage: torch.dtype,
    calibration: Calibration,
    compute: Compute = Compute.EXACT,
) -> torch.Tensor:
    """Relative weight error, float64, shape (layers, candidates); zero where a format does not fit.

    Args:
        calibration: what was rounded for the candidates.
        compute: weights are taken as it multiplies with them; it says nothing of inputs.
    """
    layers = list(quantizable_layers(model))
    found = torch.zeros(len(layers), len(candidates), dtype=torch.float64)
    for i, (name, layer) in enumerate(layers):
        weight = layer.weight.detach().to(storage)
        power = weight.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        for j, candidate in enumerate(candidates):
            if candidate.format.fits(weight.shape):
                stored = stored_weight(name, weight, Choice(candidate.format, False, candidate.quantizer), calibration)
                back = multiplied_weight(layer, candidate.format, stored, torch.float32, compute)
                found[i, j] = (back.double() - weight.double()).square().sum() / power
    return found
