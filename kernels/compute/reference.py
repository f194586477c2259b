"""The reference kernels, in plain torch code. They take any call with their compute mode on any device, and every other
kernel is tested against them."""

from __future__ import annotations

from abc import abstractmethod

import torch

from bitpolicy.kernels.compute.block_scaled import block_scaled_product
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


class _RoundingReference(Kernel):
    """Takes every call. Under autocast, too: sums must stay integer or float32."""

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        return None

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self._product(x, weight, bias)

    @abstractmethod
    def _product(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """The product as its compute mode defines it."""


class Int8Reference(_RoundingReference):
    """The definition of INT8: slow, for tests and for devices without a kernel of their own."""

    name = "int8-reference"
    compute = Compute.INT8

    def _product(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        return int8_product(x, weight, bias)


class Fp8Reference(_RoundingReference):
    """The definition of FP8 for layers in `fp8` and `fp8-tensor`: slow, for tests and devices without a kernel."""

    name = "fp8-reference"
    compute = Compute.FP8

    def _product(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        return fp8_product(x, weight, bias)


class _BlockScaledReference(_RoundingReference):
    def _product(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        return block_scaled_product(x, weight, bias, self.compute)


class Mxfp8Reference(_BlockScaledReference):
    """The definition of MXFP8 for `mxfp8` and `mxfp4` weights: slow, and so far the only kernel with this compute."""

    name = "mxfp8-reference"
    compute = Compute.MXFP8


class Nvfp4Reference(_BlockScaledReference):
    """The definition of NVFP4 for `nvfp4` weights: slow, and so far the only kernel with this compute."""

    name = "nvfp4-reference"
    compute = Compute.NVFP4
