"""Weight-only CPU kernel for a few rows: `csrc/few_rows.cpp` dequantizes in registers and never writes the weight.

It sums in another order than torch, so its compute mode is FLOAT. For one or two rows (time embeddings, a batch of
one), nearly all time goes into reading the weight, and the codes are a quarter or an eighth of its float size.
"""

from __future__ import annotations

from ctypes import Array, c_int64
from math import prod

import torch

from bitpolicy.kernels.cpu import dequantize as cpu_dequantize
from bitpolicy.kernels.cpu import extension as cpu_extension
from bitpolicy.kernels.formats.affine import Affine
from bitpolicy.kernels.formats.float_codes import NormalFloat4
from bitpolicy.kernels.formats.int8 import Int8
from bitpolicy.kernels.kernel import Compute, Kernel, PackedWeight, Prepared

_MOST_ROWS = 16
_BLOCK = 32  # weights read at once


class CpuFloat(Kernel):
    name = "cpu-float"
    compute = Compute.FLOAT

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        if x.device.type != "cpu":
            return "not on the CPU"
        if reason := cpu_dequantize.refuses(weight, x.dtype):
            return reason
        if prod(x.shape[:-1]) > _MOST_ROWS:
            return f"for at most {_MOST_ROWS} rows"
        format = weight.format
        if isinstance(format, Int8 | NormalFloat4):
            return None
        if not isinstance(format, Affine) or format.rotated or format.bits not in (4, 8):
            return f"not for {format.name}"
        return f"for group sizes in multiples of {_BLOCK}" if (format.group or 0) % _BLOCK else None

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        tensors, zero = weight.tensors, weight.tensors.get("weight_zero")
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        if y.numel():
            cpu_extension.library().bitpolicy_few_rows(  # type: ignore[union-attr]
                _plans.get((weight.kind, x.dtype)) or _plan(weight, x.dtype),
                tensors["weight_packed"].data_ptr(),
                tensors["weight_scale"].data_ptr(),
                None if zero is None else zero.data_ptr(),
                cpu_dequantize.nf4_values().data_ptr() if isinstance(weight.format, NormalFloat4) else None,
                x.data_ptr(),
                x.numel() // weight.shape[1],
                None if bias is None else bias.data_ptr(),
                y.data_ptr(),
                torch.get_num_threads(),
            )
        return y


_plans: dict[tuple[int, torch.dtype], Array[c_int64]] = {}


def _plan(weight: PackedWeight, dtype: torch.dtype) -> Array[c_int64]:
    """The plan that csrc/few_rows.cpp expects, computed once per kind of weight."""
    format, (out, length) = weight.format, weight.shape
    assert isinstance(format, Affine | Int8 | NormalFloat4)
    bits = format.bits if isinstance(format, Affine) else 4 if isinstance(format, NormalFloat4) else 0
    numbers = (bits, out, length, format.run(length), cpu_extension.dtype_code(dtype) or 0)
    plan = _plans[weight.kind, dtype] = (c_int64 * len(numbers))(*numbers)
    return plan
