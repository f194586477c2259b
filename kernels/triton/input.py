"""Quantizes inputs to 8 bits with Triton kernels, as `bitpolicy.kernels.compute.int8` and `fp8_compute` define it.

    s_x = hi / 255 - lo / 255,    z = min(round(-lo / s_x), 255),    x_q = clamp(round(x / s_x) + z, 0, 255)
    s_x = max(hi, -lo) / 448,     x_q = e4m3(x / s_x)

Tensor cores multiply signed bytes, so for integers x_q - 128 and z - 128 are stored; their difference is the same.

A row is read once. A sample is read twice. First many programs find its range, and each stores two numbers. Then the
codes are written channels last, whatever the order of the input. The padding of a convolution, with code z, is written
around them, so that all pixels are multiplied alike and z adds the same to each sum. With float8 the padding is zero.

Layers that multiply the same input one after the other, such as q, k and v, share its codes: each thread keeps the last
ones.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.multiprocessing.reductions import StorageWeakRef

from bitpolicy.kernels.triton.product import three
from bitpolicy.kernels.triton.tiles import nearest_float8

_PARTS = 256  # maximum number of programs that find the range of a sample
_AT_ONCE = 16384  # longest row that one program holds


class Quantized(NamedTuple):
    """An input in 8 bits.

    Attributes:
        codes: x_q - 128, int8, or x_q, float8, contiguous; for a convolution channels last and padded,
            (B, *spatial, in).
        scale: s_x, float32, one per row, pixel or sample.
        zero: z - 128, int32, likewise; None for float8.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


def quantized(
    x: torch.Tensor, dims: Sequence[int], padding: Sequence[int] = (), code: torch.dtype = torch.int8
) -> Quantized:
    """Quantize an input to 8 bits, as defined in `int8_compute` or, for float8, in `fp8_compute`.

    Args:
        x: float, not empty, shape (..., in) or (B, in, *spatial).
        dims: the dimensions that share a scale, from `int8_compute.shared`.
        padding: to add around each sample, on both sides of each spatial dimension.
        code: int8 or float8_e4m3fn.
    """
    dims, padding = tuple(dims), tuple(padding)
    key = _identity(x, dims, padding, code)
    last = getattr(_last, "made", None)
    if key is not None and last is not None and last[0] == key and not last[1].expired():
        return last[2]
    if dims == (-1,):
        made = _quantized_rows(x, code)
    elif dims == (1,):
        made = _quantized_pixels(x, code)
    else:
        made = _quantized_samples(x, padding, code)
    _last.made = None if key is None else (key, StorageWeakRef(x.untyped_storage()), made)
    return made


def forget() -> None:
    """Release the codes that this thread keeps."""
    _last.made = None


_last = threading.local()


def _identity(x: torch.Tensor, *how: object) -> tuple[object, ...] | None:
    """A key that identifies an input and its current values; None if there is no such key."""
    if x.is_inference():
        return None  # torch does not count writes to it
    stream = capture = None
    if x.is_cuda:
        stream = torch.cuda.current_stream(x.device).cuda_stream
        capture = _capture(stream) if torch.cuda.is_current_stream_capturing() else 0
        if capture is None:
            return None
    where = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype)
    return (*where, x._version, *how, stream, capture)


def _capture(stream: int) -> int | None:
    """The driver's ID of the CUDA graph being captured. Tensors made in one capture are useless outside it."""
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    error = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return number.value if error == 0 and status.value == 1 else None


def _empty(x: torch.Tensor, sets: int, shape: Sequence[int], code: torch.dtype) -> Quantized:
    """Empty tensors for codes of this shape, and for the scales and zero points of `sets` rows, pixels or samples."""
    return Quantized(
        torch.empty(tuple(shape), dtype=code, device=x.device),
        torch.empty(sets, dtype=torch.float32, device=x.device),
        torch.empty(sets, dtype=torch.int32, device=x.device) if code == torch.int8 else None,
    )


def _quantized_rows(x: torch.Tensor, code: torch.dtype) -> Quantized:
    length = x.shape[-1]
    rows = x.reshape(-1, length)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    made = _empty(x, rows.shape[0], rows.shape, code)
    block = min(triton.next_power_of_2(length), _AT_ONCE)
    warps = 4 if block <= 4096 else 8
    _quantize_rows[(rows.shape[0],)](
        rows, *made, length, rows.stride(0), BLOCK=block, ONCE=length <= block, num_warps=warps
    )
    return made


def _quantized_pixels(x: torch.Tensor, code: torch.dtype) -> Quantized:
    """Quantize with one scale per pixel. If the input is channels last, its pixels are rows."""
    last = x.movedim(1, -1)
    if last.is_contiguous():
        return _quantized_rows(last, code)
    samples, channels, *spatial = x.shape
    made, pixels = _empty(x, samples * prod(spatial), last.shape, code), prod(spatial)
    across = triton.cdiv(pixels, 32)
    _quantize_pixels[(samples * across,)](x.contiguous(), *made, channels, pixels, across, BP=32, BC=64)
    return made


def _quantized_samples(x: torch.Tensor, padding: tuple[int, ...], code: torch.dtype) -> Quantized:
    samples, channels, *spatial = x.shape
    if not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        x = x.contiguous()
    pixels, size = prod(spatial), channels * prod(spatial)
    parts = min(triton.next_power_of_2(triton.cdiv(size, 8192)), _PARTS)
    part = triton.cdiv(size, parts)
    reach = torch.empty((2, samples, parts), dtype=torch.int32, device=x.device)
    _reach[(samples, parts)](x, *reach, size, part, parts, BLOCK=min(triton.next_power_of_2(part), 4096))
    padding = padding or (0,) * len(spatial)
    padded = [n + 2 * pad for n, pad in zip(spatial, padding, strict=True)]
    made = _empty(x, samples, (samples, *padded, channels), code)
    channel, pixel = (pixels, 1) if x.is_contiguous() else (1, channels)
    across = triton.cdiv(prod(padded), 64)
    _quantize_samples[(samples * across, triton.cdiv(channels, 64))](
        x, *reach, *made, channels, across, channel, pixel, *three(spatial, 1), *three(padding, 0),
        PARTS=parts, BP=64, BC=64,
    )  # fmt: skip
    return made


@triton.jit
def _quantize_rows(x_ptr, q_ptr, s_ptr, z_ptr, K, x_row, BLOCK: tl.constexpr, ONCE: tl.constexpr):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    if ONCE:
        x = tl.load(x_ptr + row * x_row + k, mask=k < K, other=0.0).to(tl.float32)
        above, below = _farther(x, 0, 0)
        scale, zero = _grid_of(tl.max(above, 0), tl.max(below, 0), dtype)
        tl.store(q_ptr + row * K + k, _codes(x, scale, zero, dtype), mask=k < K)
    else:
        above = tl.zeros((BLOCK,), dtype=tl.int32)
        below = tl.zeros((BLOCK,), dtype=tl.int32)
        for k0 in range(0, K, BLOCK):
            x = tl.load(x_ptr + row * x_row + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)
            above, below = _farther(x, above, below)
        scale, zero = _grid_of(tl.max(above, 0), tl.max(below, 0), dtype)
        for k0 in range(0, K, BLOCK):
            x = tl.load(x_ptr + row * x_row + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)
            tl.store(q_ptr + row * K + k0 + k, _codes(x, scale, zero, dtype), mask=k0 + k < K)
    tl.store(s_ptr + row, scale)
    if z_ptr is not None:
        tl.store(z_ptr + row, zero)


@triton.jit
def _quantize_pixels(x_ptr, q_ptr, s_ptr, z_ptr, C, pixels, across, BP: tl.constexpr, BC: tl.constexpr):
    """Quantize some pixels of a channels-first sample."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    sample = (tl.program_id(0) // across).to(tl.int64)
    p = tl.program_id(0) % across * BP + tl.arange(0, BP)
    start = sample * pixels * C
    above = tl.zeros((BP, BC), dtype=tl.int32)
    below = tl.zeros((BP, BC), dtype=tl.int32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)[None, :]
        known = (p < pixels)[:, None] & (c < C)
        x = tl.load(x_ptr + start + c * pixels + p[:, None], mask=known, other=0.0).to(tl.float32)
        above, below = _farther(x, above, below)
    scale, zero = _grid_of(tl.max(above, 1), tl.max(below, 1), dtype)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)[None, :]
        known = (p < pixels)[:, None] & (c < C)
        x = tl.load(x_ptr + start + c * pixels + p[:, None], mask=known, other=0.0).to(tl.float32)
        tl.store(q_ptr + start + p[:, None] * C + c, _codes(x, scale[:, None], zero[:, None], dtype), mask=known)
    tl.store(s_ptr + sample * pixels + p, scale, mask=p < pixels)
    if z_ptr is not None:
        tl.store(z_ptr + sample * pixels + p, zero, mask=p < pixels)


@triton.jit
def _farther(x, above, below):
    """The larger of x's reach above and below zero and the given reach, as integers that order like the floats. NaN
    exceeds everything on one of the sides."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.maximum(tl.maximum(bits, 0), above), tl.maximum(tl.maximum(bits ^ -0x80000000, 0), below)


@triton.jit
def _grid_of(above, below, dtype: tl.constexpr):
    """s_x, NaN if it is not finite, and z - 128, or 0 for float8 codes."""
    hi, lo = above.to(tl.float32, bitcast=True), below.to(tl.float32, bitcast=True)  # lo is unsigned
    farthest = tl.maximum(above, below)
    if dtype == tl.int8:
        scale = tl.div_rn(hi, 255.0) + tl.div_rn(lo, 255.0)
    else:
        scale = tl.div_rn(farthest.to(tl.float32, bitcast=True), 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    scale = tl.where(farthest >= 0x7F800000, float("nan"), scale)
    if dtype == tl.int8:
        zero = tl.minimum(_nearest(tl.div_rn(lo, scale)) - 128, 127)
    else:
        zero = tl.zeros_like(farthest)
    return scale, zero


@triton.jit
def _nearest(v):
    """v in [-2^22, 2^22] rounded to nearest, ties to even, int32."""
    return (v + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _codes(x, scale, zero, dtype: tl.constexpr):
    """x_q - 128, or x_q as float8; arbitrary where the scale is NaN."""
    if dtype == tl.int8:
        code = _nearest(tl.div_rn(x, scale)) + zero
        return tl.minimum(tl.maximum(code, -128), 127).to(tl.int8)
    else:
        return nearest_float8(tl.div_rn(x, scale))


@triton.jit
def _reach(x_ptr, above_ptr, below_ptr, size, part, parts, BLOCK: tl.constexpr):
    """The range of one part of one sample, from `_farther`."""
    first = tl.program_id(1) * part
    start = x_ptr + tl.program_id(0).to(tl.int64) * size
    above = tl.zeros((BLOCK,), dtype=tl.int32)
    below = tl.zeros((BLOCK,), dtype=tl.int32)
    for i0 in range(first, min(first + part, size), BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        x = tl.load(start + i, mask=(i < first + part) & (i < size), other=0.0).to(tl.float32)
        above, below = _farther(x, above, below)
    at = tl.program_id(0) * parts + tl.program_id(1)
    tl.store(above_ptr + at, tl.max(above, 0))
    tl.store(below_ptr + at, tl.max(below, 0))


@triton.jit
def _quantize_samples(
    x_ptr, above_ptr, below_ptr, q_ptr, s_ptr, z_ptr, C, across, x_channel, x_pixel, D, H, W, PD, PH, PW,
    PARTS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Quantize some channels of some pixels of a padded sample."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    sample = (tl.program_id(0) // across).to(tl.int64)
    parts = sample * PARTS + tl.arange(0, PARTS)
    above, below = tl.max(tl.load(above_ptr + parts), 0), tl.max(tl.load(below_ptr + parts), 0)
    scale, zero = _grid_of(above, below, dtype)
    high, wide = H + 2 * PH, W + 2 * PW
    pixels = (D + 2 * PD) * high * wide
    p = tl.program_id(0) % across * BP + tl.arange(0, BP)[:, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    d, h, w = p // (high * wide) - PD, p // wide % high - PH, p % wide - PW
    inside = (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W) & (c < C)
    start = x_ptr + sample * (D * H * W) * C
    x = tl.load(start + ((d * H + h) * W + w) * x_pixel + c * x_channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(q_ptr + sample * pixels * C + p * C + c, _codes(x, scale, zero, dtype), mask=(p < pixels) & (c < C))
    if (tl.program_id(0) % across == 0) & (tl.program_id(1) == 0):
        tl.store(s_ptr + sample, scale)
        if z_ptr is not None:
            tl.store(z_ptr + sample, zero)
