"""The quantization settings that all layers of a model share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from bitpolicy.kernels.kernel import Compute
from bitpolicy.policies.calibration import Calibration


@dataclass(frozen=True)
class Quantization:
    """Settings that all layers share; a `Choice` has the settings of one layer.

    Attributes:
        calibration: mean inputs for bias correction, and the weights that were rounded in advance.
        storage: dtype of everything that is not packed, torch.float16 or torch.bfloat16. The unquantized weight in
            this dtype is the reference for errors.
        compute: activation quantization of packed layers.
    """

    calibration: Calibration = field(default_factory=Calibration)
    storage: torch.dtype = torch.float16
    compute: Compute = Compute.EXACT

    def of_component(self, component: str, components: Sequence[str]) -> Quantization:
        """The same settings with the calibration of one component, by the layers' names within it."""
        return replace(self, calibration=self.calibration.of_component(component, components))
