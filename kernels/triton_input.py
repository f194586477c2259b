"""Inputs in 8 bits, by Triton kernels: the codes and scales of `bitpolicy.kernels.int8_compute`.

    s_x = max|x| / 127 of each row, or of each sample, and x_q = clamp(round(x / s_x), -127, 127)

A row is read once. A sample is read twice: its maximum is taken by many programs, each of which leaves one number, then
its codes are written channels last, in whatever order it came. Layers that multiply the same input in turn, as q, k and
v do, share its codes: the last ones made are kept, one a thread.
"""

from __future__ import annotations

import ctypes
import threading
from math import prod

import torch
import triton
import triton.language as tl
from torch.multiprocessing.reductions import StorageWeakRef

from bitpolicy.kernels.triton_tiles import nearest_code, scale_of, size_bits

_PARTS = 256  # programs at most that look for the maximum of a sample
_AT_ONCE = 16384  # longest row that a program holds
Quantized = tuple[torch.Tensor, torch.Tensor]


def quantized(x: torch.Tensor, per_sample: bool) -> Quantized:
    """x_q, int8, channels last and contiguous, and s_x, float32, one for each row or sample.

    Args:
        x: float, not empty, shape (..., in), or (B, in, *spatial) if `per_sample`.
    """
    key = _identity(x, per_sample)
    last = getattr(_last, "made", None)
    if key is not None and last is not None and last[0] == key and not last[1].expired():
        return last[2]
    made = _quantized_samples(x) if per_sample else _quantized_rows(x)
    _last.made = None if key is None else (key, StorageWeakRef(x.untyped_storage()), made)
    return made


def forget() -> None:
    """Let go of the codes that this thread keeps."""
    _last.made = None


_last = threading.local()


def _identity(x: torch.Tensor, per_sample: bool) -> tuple[object, ...] | None:
    """What tells an input from every other and from itself before it was written to; None where nothing can."""
    if x.is_inference():
        return None  # does not count its writes
    stream = capture = None
    if x.is_cuda:
        stream = torch.cuda.current_stream(x.device).cuda_stream
        capture = _capture(stream) if torch.cuda.is_current_stream_capturing() else 0
        if capture is None:
            return None
    where = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype)
    return (*where, x._version, per_sample, stream, capture)


def _capture(stream: int) -> int | None:
    """The number that the driver gave to the CUDA graph being captured: what one holds is of no use outside it."""
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    error = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return number.value if error == 0 and status.value == 1 else None


def _quantized_rows(x: torch.Tensor) -> Quantized:
    length = x.shape[-1]
    rows = x.reshape(-1, length)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(length), _AT_ONCE)
    warps = 4 if block <= 4096 else 8
    _quantize_rows[(rows.shape[0],)](
        rows, codes, scale, length, rows.stride(0), BLOCK=block, ONCE=length <= block, num_warps=warps
    )
    return codes, scale


def _quantized_samples(x: torch.Tensor) -> Quantized:
    samples, channels, *spatial = x.shape
    if not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        x = x.contiguous()
    pixels, size = prod(spatial), channels * prod(spatial)
    parts = min(triton.next_power_of_2(triton.cdiv(size, 8192)), _PARTS)
    part = triton.cdiv(size, parts)
    largest = torch.empty((samples, parts), dtype=torch.int32, device=x.device)
    _largest[(samples, parts)](x, largest, size, part, parts, BLOCK=min(triton.next_power_of_2(part), 4096))
    codes = torch.empty((samples, *spatial, channels), dtype=torch.int8, device=x.device)
    scale = torch.empty(samples, dtype=torch.float32, device=x.device)
    channel, pixel = (pixels, 1) if x.is_contiguous() else (1, channels)
    across = triton.cdiv(pixels, 64)
    _quantize_samples[(samples * across, triton.cdiv(channels, 64))](
        x, largest, codes, scale, channels, pixels, across, channel, pixel, PARTS=parts, BP=64, BC=64
    )
    return codes, scale


@triton.jit
def _quantize_rows(x_ptr, q_ptr, s_ptr, K, x_row, BLOCK: tl.constexpr, ONCE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    if ONCE:
        x = tl.load(x_ptr + row * x_row + k, mask=k < K, other=0.0).to(tl.float32)
        scale = scale_of(tl.max(size_bits(x), 0))
        tl.store(q_ptr + row * K + k, _codes(x, scale), mask=k < K)
    else:
        largest = tl.zeros((BLOCK,), dtype=tl.int32)
        for k0 in range(0, K, BLOCK):
            x = tl.load(x_ptr + row * x_row + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, size_bits(x))
        scale = scale_of(tl.max(largest, 0))
        for k0 in range(0, K, BLOCK):
            x = tl.load(x_ptr + row * x_row + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)
            tl.store(q_ptr + row * K + k0 + k, _codes(x, scale), mask=k0 + k < K)
    tl.store(s_ptr + row, scale)


@triton.jit
def _codes(x, scale):
    """Rounded codes; any where the scale is NaN."""
    ratio = tl.div_rn(x, scale)
    return nearest_code(tl.minimum(tl.maximum(ratio, -127.0), 127.0))


@triton.jit
def _largest(x_ptr, largest_ptr, size, part, parts, BLOCK: tl.constexpr):
    """The largest |x|, as `size_bits`, of one part of one sample."""
    first = tl.program_id(1) * part
    start = x_ptr + tl.program_id(0).to(tl.int64) * size
    largest = tl.zeros((BLOCK,), dtype=tl.int32)
    for i0 in range(first, min(first + part, size), BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        x = tl.load(start + i, mask=(i < first + part) & (i < size), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, size_bits(x))
    tl.store(largest_ptr + tl.program_id(0) * parts + tl.program_id(1), tl.max(largest, 0))


@triton.jit
def _quantize_samples(
    x_ptr, largest_ptr, q_ptr, s_ptr, C, pixels, across, x_channel, x_pixel,
    PARTS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // across).to(tl.int64)
    scale = scale_of(tl.max(tl.load(largest_ptr + sample * PARTS + tl.arange(0, PARTS)), 0))
    p = tl.program_id(0) % across * BP + tl.arange(0, BP)[:, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    known = (p < pixels) & (c < C)
    start = sample * pixels * C
    x = tl.load(x_ptr + start + p * x_pixel + c * x_channel, mask=known, other=0.0).to(tl.float32)
    tl.store(q_ptr + start + p * C + c, _codes(x, scale), mask=known)
    if (tl.program_id(0) % across == 0) & (tl.program_id(1) == 0):
        tl.store(s_ptr + sample, scale)
