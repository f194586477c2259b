"""What a policy gives one layer."""

from __future__ import annotations

from dataclasses import dataclass

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.quantizers.named import HESSIANS


@dataclass(frozen=True)
class Choice:
    """What one layer gets.

    Attributes:
        format: storage format of its weight.
        bias_correction: whether its bias takes up the mean error of the weight.
        quantizer: who picks codes and scales, one of `bitpolicy.kernels.quantizers.named`; "rtn" is round to nearest.
    """

    format: Format
    bias_correction: bool = False
    quantizer: str = "rtn"

    @property
    def needs_calibration(self) -> bool:
        """Whether it cannot be made from the weight alone."""
        return self.bias_correction or self.quantizer in HESSIANS
