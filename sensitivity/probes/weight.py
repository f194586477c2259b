"""The data-free probe: |Q(W) - W|^2 / |W|^2 of each layer.

It is for models that cannot be run, and says little about images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitpolicy.kernels.layers import HasModules, quantizable_layers
from bitpolicy.policies.apply import stored_weight
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.rounded_layers import multiplied_weight, packed_weight
from bitpolicy.sensitivity.probes.probe import Probe
from bitpolicy.sensitivity.rounding.candidates import Candidate
from bitpolicy.sensitivity.table import SensitivityTable


class WeightProbe(Probe):
    """Scores layers by their relative weight errors, and runs nothing."""

    name = "weight"
    chooses_quantizer = False
    outside_loop = True
    takes_gradients = False
    data_free = True

    def table(self) -> SensitivityTable:
        """The weight errors, with every bias corrected."""
        inputs = self._inputs
        with inputs.stages.bar(1, f"{self.name} probe") as advance:
            error = weight_errors(inputs.trajectories.target, inputs.candidates, quantization=inputs.quantization)
            advance()
        corrected = torch.ones_like(error, dtype=torch.bool)
        return SensitivityTable(self.name, inputs.names, inputs.formats, error, corrected, quantizers=inputs.quantizers)

    def forwards(self) -> int:
        return 0


def weight_errors(
    model: HasModules,
    candidates: Sequence[Candidate],
    *,
    quantization: Quantization,
) -> torch.Tensor:
    """Relative weight error, float64, shape (layers, candidates); zero where a format does not fit.

    Args:
        quantization: its compute decides what a layer multiplies with. Rounded inputs are not considered.
    """
    layers = list(quantizable_layers(model))
    found = torch.zeros(len(layers), len(candidates), dtype=torch.float64)
    for i, (name, layer) in enumerate(layers):
        weight = layer.weight.detach().to(quantization.storage)
        power = weight.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        for j, candidate in enumerate(candidates):
            if candidate.format.fits(weight.shape):
                stored = stored_weight(
                    name, weight, Choice(candidate.format, False, candidate.quantizer), quantization.calibration
                )
                packed = packed_weight(layer, candidate.format, stored)
                back = multiplied_weight(packed, torch.float32, quantization.compute)
                found[i, j] = (back.double() - weight.double()).square().sum() / power
    return found
