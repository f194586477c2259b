"""What a policy chooses for one layer."""

from __future__ import annotations

from dataclasses import dataclass

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.quantizers.named import HESSIANS


@dataclass(frozen=True)
class Choice:
    """The format, bias correction and rounding method of one layer.

    Attributes:
        format: storage format of its weight.
        bias_correction: whether its bias is corrected for the mean error of the weight.
        quantizer: rounding method, one of `bitpolicy.kernels.quantizers.named`; "rtn" is round to nearest.
    """

    format: Format
    bias_correction: bool = False
    quantizer: str = "rtn"

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing needs more than the weight."""
        return self.bias_correction or self.quantizer in HESSIANS
