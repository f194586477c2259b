"""The reference kernels, in plain torch code. They take any call with their compute mode on any device, and every other
kernel is tested against them."""

from __future__ import annotations

import torch

from bitpolicy.kernels.compute.fp8 import fp8_product
from bitpolicy.kernels.compute.int8 import int8_product, multiply
from bitpolicy.kernels.kernel import Compute, Kernel, PackedWeight, Prepared


class Reference(Kernel):
    """Dequantize, then multiply with torch: the definition of EXACT."""

    name = "reference"
    compute = Compute.EXACT

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        return None

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        return multiply(x, weight.dequantize(x.dtype), weight.geometry, bias)


class Int8Reference(Kernel):
    """The definition of INT8: slow, for tests and for devices without a kernel of their own."""

    name = "int8-reference"
    compute = Compute.INT8

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        return None

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):  # sums must stay integer or float32
            return int8_product(x, weight, bias)


class Fp8Reference(Kernel):
    """The definition of FP8 for `fp8` weights: slow, for tests and for devices without a kernel of their own."""

    name = "fp8-reference"
    compute = Compute.FP8

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        return None

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return fp8_product(x, weight, bias)
