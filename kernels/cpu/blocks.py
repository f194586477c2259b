"""Weights only, on the CPU, for large weights: a block of output channels is dequantized into the cache, multiplied by
torch while it lies there, and overwritten by the next.

Written out as a whole, a weight that no cache holds goes to main memory and comes back, and torch turns that of a
convolution into a layout of its own on the way, which makes another trip. So this can be faster than an ordinary layer,
and needs a few megabytes where the whole takes a hundred.

A sum's order is torch's own choice, and nobody promises that it is the same for fewer output channels. It was in every
product tried (docs/decisions.md); where it is not, the micro-probe sees other bits and leaves this kernel out.
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
    """Dequantize a block of output channels, multiply, go on with the next.

    Args:
        least: bytes of a weight, in the dtype of the input, from which on it is cut.
        block: bytes of a block, about.
        channels: a block has a multiple of so many, as torch's products do best.
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
            return "not for channels in groups"
        if weight.geometry is not None and _may_lie_channels_last(x):
            return "for inputs that lie in channels"  # else torch adds up otherwise for few output channels
        if weight.shape[0] % self._channels:
            return f"for output channels in whole {self._channels}s"
        if prod(weight.shape) * x.dtype.itemsize < self._least:
            return f"for weights of {self._least // _MIB} MiB and more"
        return "one block holds it all" if self._rows(weight, x.dtype) >= weight.shape[0] else None

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
            part = _rows_of(weight, here)
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
        """Output channels of a block."""
        one = self._channels * weight.row_length * dtype.itemsize
        return self._channels * max(1, round(self._block / one))


def _rows_of(weight: PackedWeight, rows: slice) -> PackedWeight:
    """Some output channels of a weight, whose stored tensors all have these as their first dimension."""
    shape = (rows.stop - rows.start, *weight.shape[1:])
    return PackedWeight(weight.format, shape, {n: t[rows] for n, t in weight.tensors.items()}, weight.geometry)


def _may_lie_channels_last(x: torch.Tensor) -> bool:
    """Whether torch may take a convolution's input to have its channels innermost: a single pixel lies both ways."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return not x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))
