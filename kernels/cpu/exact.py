"""Weight-only CPU kernel: C++ dequantizes into memory shared by all layers, and torch multiplies.

The multiplication is torch's own, with a weight of the same bits and strides, so the result equals the reference.
"""

from __future__ import annotations

from math import prod

import torch

from bitpolicy.kernels.compute.int8 import multiply
from bitpolicy.kernels.cpu import dequantize as cpu_dequantize
from bitpolicy.kernels.cpu.scratch import scratch_tensor
from bitpolicy.kernels.kernel import Compute, Kernel, PackedWeight, Prepared, recorded


class CpuDequantize(Kernel):
    name = "cpu-dequantize"
    compute = Compute.EXACT
    settled = True

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        return "not on the CPU" if x.device.type != "cpu" else cpu_dequantize.refuses(weight, x.dtype)

    def scratch(self, weight: PackedWeight, dtype: torch.dtype) -> int:
        return prod(weight.shape) * dtype.itemsize

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        return whole(x, weight, bias)


def whole(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The product with the whole weight, dequantized at once."""
    to = torch.empty(weight.shape, dtype=x.dtype) if recorded(x, bias) else scratch_tensor(weight.shape, x.dtype)
    return multiply(x, cpu_dequantize.dequantize(weight, to), weight.geometry, bias)
