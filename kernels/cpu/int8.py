"""INT8 activation quantization on the CPU with `csrc/int8.cpp`: quantization, product and scales in one AVX-512 VNNI
call.

The result is bit-equal to `int8_product`, because divisions, roundings and sums have the same order. The weight's codes
are rearranged once, so that four inputs of sixteen output channels are adjacent. This takes one byte per weight in
addition to the stored bytes.
"""

from __future__ import annotations

from ctypes import Array, c_int64
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import prod

import torch

from bitpolicy.kernels.compute.int8 import takes_pixels, weight_codes
from bitpolicy.kernels.cpu import dequantize as cpu_dequantize
from bitpolicy.kernels.cpu import extension as cpu_extension
from bitpolicy.kernels.cpu.layout import CHANNELS_LAST, channels_last_strides, contiguous_strides, in_channels_last
from bitpolicy.kernels.cpu.scratch import scratch, scratch_tensor
from bitpolicy.kernels.formats.named import INT8
from bitpolicy.kernels.kernel import Compute, Geometry, Kernel, PackedWeight, Prepared

_LINE = 64  # bytes per cache line; codes start at a line
_LONGEST = 2**16  # weights in a row whose sum fits 32 bits: 255 * 127 * 2^16 < 2^31


class CpuInt8(Kernel):
    name = "cpu-int8"
    compute = Compute.INT8
    settled = True

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        if x.device.type != "cpu":
            return "not on the CPU"
        if reason := cpu_extension.why_unavailable():
            return reason
        if not cpu_extension.has_int8():
            return "this machine has no AVX-512 VNNI"
        if cpu_extension.dtype_code(x.dtype) is None:
            return f"not for {x.dtype}"
        if weight.geometry is not None and weight.geometry.groups != 1:
            return "not for grouped convolutions"
        return f"for rows shorter than {_LONGEST}" if weight.row_length >= _LONGEST else None

    def prepare(self, weight: PackedWeight, dtype: torch.dtype) -> Prepared:
        return {} if weight.low_memory else laid_out(weight)

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        layout = prepared or laid_out(weight)
        call = _call(x.shape, x.stride(), x.dtype, weight.shape, weight.geometry)
        x = call.dense(x)
        y = torch.empty_strided(call.shape, call.strides, dtype=x.dtype)
        if y.numel():
            work = scratch(call.work).data_ptr()
            cpu_extension.library().bitpolicy_int8_multiply(  # type: ignore[union-attr]
                call.plan,
                x.data_ptr(),
                layout["codes"].data_ptr(),
                layout["scale"].data_ptr(),
                layout["offsets"].data_ptr(),
                None if bias is None else bias.data_ptr(),
                y.data_ptr(),
                work + call.grids,
                work,
                call.dtype,
                torch.get_num_threads(),
            )
        return y


def laid_out(weight: PackedWeight) -> dict[str, torch.Tensor]:
    """The weight in the kernel's layout: `codes`, int8; `scale` and `offsets`, padded to whole vectors of channels."""
    codes, scale = _codes(weight)
    codes = codes.contiguous()  # keeps them alive during the call below; a no-op unless they are channels last
    out, channels = weight.shape[:2]
    taps, padded = weight.row_length // channels, -(-out // 16) * 16
    packed = torch.empty(padded * taps * -(-channels // 4) * 4, dtype=torch.int8)
    offsets = torch.empty(padded, dtype=torch.int32)
    cpu_extension.library().bitpolicy_int8_pack(  # type: ignore[union-attr]
        codes.data_ptr(), out, channels, taps, packed.data_ptr(), offsets.data_ptr()
    )
    return {"codes": packed, "scale": torch.nn.functional.pad(scale, (0, padded - out)), "offsets": offsets}


def _codes(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight_codes`, dequantized by C++ where possible."""
    if weight.format == INT8 or cpu_dequantize.refuses(weight, torch.float32):
        return weight_codes(weight)
    stored = INT8.quantize(cpu_dequantize.dequantize(weight, scratch_tensor(weight.shape, torch.float32)))
    return stored["weight_packed"], stored["weight_scale"]


@dataclass(frozen=True, eq=False)
class _Call:
    """What a call of one shape needs, computed once.

    Attributes:
        plan: `Plan` of csrc/int8.cpp.
        shape, strides: of the result.
        dtype: the library's code for it.
        grids: bytes of scratch before the codes, for scales and zero points.
        work: bytes of scratch.
        memory_format: required of the input.
    """

    plan: Array[c_int64]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: int | None
    grids: int
    work: int
    memory_format: torch.memory_format

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        return (
            x if x.is_contiguous(memory_format=self.memory_format) else x.contiguous(memory_format=self.memory_format)
        )


@lru_cache(maxsize=4096)
def _call(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    weight: tuple[int, ...],
    geometry: Geometry | None,
) -> _Call:
    rows, leading = geometry is None, shape[:-1]
    if geometry is None:  # treat it as a convolution of one tap over a line of rows
        shape, strides = (1, shape[-1], prod(leading)), (0, 0, 0)
        weight, geometry = (*weight, 1), Geometry((1,), (0,), (1,))
    samples, channels, *size = shape
    out, _, *kernel = weight
    steps = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    ]
    last = rows or (in_channels_last(shape, strides) and (len(size) == 2 or prod(kernel) > 1))
    result = (*leading, out) if rows else (samples, out, *steps)
    padded = prod(n + 2 * p for n, p in zip(size, geometry.padding, strict=True))
    pixels = takes_pixels(weight, geometry)
    grids = -(-8 * samples * (prod(size) if pixels else 1) // _LINE) * _LINE
    three = [
        [fill] * (3 - len(size)) + list(numbers)
        for numbers, fill in zip(
            (size, kernel, geometry.stride, geometry.padding, geometry.dilation), (1, 1, 1, 0, 1), strict=True
        )
    ]
    plan = [samples, channels, out, *chain(*three), pixels, not last, last]
    return _Call(
        plan=(c_int64 * len(plan))(*plan),
        shape=result,
        strides=contiguous_strides(result) if rows or not last else channels_last_strides(result),
        dtype=cpu_extension.dtype_code(dtype),
        grids=grids,
        work=grids + samples * padded * -(-channels // 4) * 4,
        memory_format=CHANNELS_LAST[len(size)] if last and not rows else torch.contiguous_format,
    )
