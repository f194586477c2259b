"""How a quantized model is stored and computed with, whatever each of its layers gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from bitpolicy.kernels.kernel import Compute
from bitpolicy.policies.calibration import Calibration


@dataclass(frozen=True)
class Quantization:
    """What all layers share; a `Choice` says what each layer gets.

    Attributes:
        calibration: E[x] of each layer, for corrected biases, and what quantizers made of the weights.
        storage: dtype of the stored weights, torch.float16 or torch.bfloat16; errors are taken against the weight in
            this dtype.
        compute: what the products of packed layers round: nothing, or their inputs too.
    """

    calibration: Calibration = field(default_factory=Calibration)
    storage: torch.dtype = torch.float16
    compute: Compute = Compute.EXACT

    def of_component(self, component: str, components: Sequence[str]) -> Quantization:
        """The same with the calibration of one component's layers, by their names within it."""
        return replace(self, calibration=self.calibration.of_component(component, components))
