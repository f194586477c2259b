"""Weight-only CPU kernel for large weights. It dequantizes a block of output channels into the cache, multiplies it
with torch while it is there, and overwrites it with the next block.

A weight that is dequantized as a whole and exceeds the cache travels to main memory and back. For a convolution, torch
then converts it to a layout of its own, which is another round trip. So blocks can be faster than an ordinary layer,
and they need a few megabytes where the whole weight takes a hundred.

torch chooses the order of a sum and does not promise the same order for fewer output channels. It was the same in every
product tried (docs/decisions/kernels.md). If it ever differs, the micro-probe sees different bits and excludes this
kernel.
"""

from __future__ import annotations

from math import prod

import torch

from bitpolicy.kernels.compute.int8 import multiply
from bitpolicy.kernels.cpu import dequantize as cpu_dequantize
from bitpolicy.kernels.cpu.exact import whole
from bitpolicy.kernels.cpu.scratch import scratch_tensor
from bitpolicy.kernels.kernel import Compute, Kernel, PackedWeight, Prepared, recorded

_MIB = 2**20


class CpuBlocks(Kernel):
    """Dequantize a block of output channels, multiply, and repeat with the next.

    Args:
        least: bytes of a weight, in the dtype of the input, from which it is split.
        block: approximate bytes of a block.
        channels: a block has a multiple of this many output channels, which suits torch's products.
    """

    name = "cpu-blocks"
    compute = Compute.EXACT
    thrifty = True

    def __init__(self, least: int = 8 * _MIB, block: int = 6 * _MIB, channels: int = 64) -> None:
        self._least, self._block, self._channels = least, block, channels

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        if x.device.type != "cpu":
            return "not on the CPU"
        if reason := cpu_dequantize.refuses(weight, x.dtype):
            return reason
        if weight.geometry is not None and weight.geometry.groups != 1:
            return "not for grouped convolutions"
        if weight.geometry is not None and _may_lie_channels_last(x):
            return "not for channels-last inputs"  # torch may sum in another order for few output channels
        if weight.shape[0] % self._channels:
            return f"for output channels in multiples of {self._channels}"
        if prod(weight.shape) * x.dtype.itemsize < self._least:
            return f"for weights of {self._least // _MIB} MiB and more"
        return "the weight fits in one block" if self._rows(weight, x.dtype) >= weight.shape[0] else None

    def scratch(self, weight: PackedWeight, dtype: torch.dtype) -> int:
        return self._rows(weight, dtype) * weight.row_length * dtype.itemsize

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        if recorded(x, bias):
            return whole(x, weight, bias)
        rows, out = self._rows(weight, x.dtype), weight.shape[0]
        channel = -1 if weight.geometry is None else 1
        y: torch.Tensor | None = None
        for start in range(0, out, rows):
            here = slice(start, min(start + rows, out))
            part = weight.rows(here)
            w = cpu_dequantize.dequantize(part, scratch_tensor(part.shape, x.dtype))
            found = multiply(x, w, weight.geometry, None if bias is None else bias[here])
            if y is None:
                shape = list(found.shape)
                shape[channel] = out
                y = found.new_empty(shape)
            y.narrow(channel, start, found.shape[channel]).copy_(found)
        assert y is not None
        return y

    def _rows(self, weight: PackedWeight, dtype: torch.dtype) -> int:
        """The number of output channels in a block."""
        one = self._channels * weight.row_length * dtype.itemsize
        return self._channels * max(1, round(self._block / one))


def _may_lie_channels_last(x: torch.Tensor) -> bool:
    """Whether torch may treat a convolution's input as channels last. A single pixel counts as either layout."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return not x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))
