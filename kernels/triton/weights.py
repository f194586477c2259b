"""Whole weights, unpacked to scratch memory by Triton kernels, for products that would otherwise unpack them many
times.

    dequantized    W = (code - zero) scale, in float32, rounded once: the bits of `Format.dequantize`
    requantized    w_q = round(W / s_w), int8, rows in storage order: those of `int8_compute.weight_codes`
    channel_scales s_w = max|W| / 127 of each output channel, and sum_k w_q

For integer formats of 4 and 8 bits without rotation. The functions named above are the references.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
import triton
import triton.language as tl

from bitpolicy.kernels.formats.affine import Affine
from bitpolicy.kernels.formats.format import Format, Shape
from bitpolicy.kernels.formats.named import INT8
from bitpolicy.kernels.formats.packing import row_length, to_rows
from bitpolicy.kernels.triton.tiles import byte_tile, nearest_code, nibble_tile, rounded_to, scale_of, size_bits, steps

_R, _K = 8, 512  # weights that a program processes at a time: rows, and positions along them
Tensors = Mapping[str, torch.Tensor]


def dequantized(
    format: Format, tensors: Tensors, shape: Shape, dtype: torch.dtype, channels_last: bool = False
) -> torch.Tensor:
    """The weight, shape `shape`, contiguous or, with `channels_last`, channels last."""
    out, channels, *kernel = shape
    length, taps = row_length(shape), prod(kernel)
    weight = torch.empty(
        (out, *kernel, channels) if channels_last else tuple(shape), dtype=dtype, device=_device(tensors)
    )
    if format == INT8:
        codes = tensors["weight_packed"].movedim(1, -1) if channels_last else tensors["weight_packed"]
        _dequantize_int8[_grid(out, length)](
            codes.contiguous(), tensors["weight_scale"], weight, out, length, R=_R, K_TILE=_K
        )
    else:
        assert isinstance(format, Affine)
        apart = 1 if channels_last else taps
        _dequantize_affine[_grid(out, length)](
            *_affine(format, tensors), weight, out, length, channels, apart, *_row(tensors),
            RUN=format.run(length), BITS=format.bits, R=_R, K_TILE=_K,
        )  # fmt: skip
    return weight.movedim(-1, 1) if channels_last else weight


def channel_scales(format: Affine, tensors: Tensors, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """s_w, float32, and sum_k w_q, int32, each of shape (out)."""
    out, length = shape[0], row_length(shape)
    scales = torch.empty(out, dtype=torch.float32, device=_device(tensors))
    sums = torch.empty(out, dtype=torch.int32, device=scales.device)
    _channel_scales[(triton.cdiv(out, _R),)](
        *_affine(format, tensors), scales, sums, out, length, *_row(tensors),
        RUN=format.run(length), BITS=format.bits, R=_R, K_TILE=_K,
    )  # fmt: skip
    return scales, sums


def requantized(format: Affine, tensors: Tensors, shape: Shape, scales: torch.Tensor) -> torch.Tensor:
    """w_q, int8, shape (out, K) in storage order, given the `channel_scales` of the same weight."""
    out, length = shape[0], row_length(shape)
    codes = torch.empty((out, length), dtype=torch.int8, device=scales.device)
    _requantize[_grid(out, length)](
        *_affine(format, tensors), scales, codes, out, length, *_row(tensors),
        RUN=format.run(length), BITS=format.bits, R=_R, K_TILE=_K, num_warps=8,
    )  # fmt: skip
    return codes


def byte_rows(codes: torch.Tensor) -> torch.Tensor:
    """One-byte codes, (out, in, *kernel), as rows in storage order. Does not copy for linear layers, convolutions of
    one tap, and channels-last codes, as `model.to(memory_format=torch.channels_last)` makes them."""
    return to_rows(codes).contiguous()


def code_sums(rows: torch.Tensor) -> torch.Tensor:
    """sum_k w_q, int32, shape (out), of int8 rows."""
    return rows.sum(1, dtype=torch.int32)


def _device(tensors: Tensors) -> torch.device:
    return tensors["weight_packed"].device


def _affine(format: Affine, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return tensors["weight_packed"], tensors["weight_scale"], None if format.symmetric else tensors["weight_zero"]


def _row(tensors: Tensors) -> tuple[int, int]:
    """Bytes and groups of a row."""
    return tensors["weight_packed"].shape[1], tensors["weight_scale"].shape[1]


def _grid(out: int, length: int) -> tuple[int, int]:
    return triton.cdiv(out, _R), triton.cdiv(length, _K)


@triton.jit
def _levels(
    w_ptr, scale_ptr, zero_ptr, rows, k0, K, row_bytes, groups,
    RUN: tl.constexpr, BITS: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """(code - zero) scale of a tile, float32, exact; arbitrary past the end of a row."""
    k = k0 + tl.arange(0, K_TILE)
    if BITS == 4:
        codes = nibble_tile(w_ptr, rows, k0, row_bytes, False, K_TILE)
    else:
        codes = byte_tile(w_ptr, rows, k0, K, row_bytes, False, K_TILE)
    at = rows[:, None] * groups + tl.minimum(k // RUN, groups - 1)[None, :]
    if zero_ptr is None:
        zero = tl.full((1, 1), 2 ** (BITS - 1), tl.int32)
    else:
        zero = tl.load(zero_ptr + at)
    return steps(codes, zero, True) * tl.load(scale_ptr + at).to(tl.float32)


@triton.jit
def _dequantize_affine(
    w_ptr, scale_ptr, zero_ptr, y_ptr, N, K, C, apart, row_bytes, groups,
    RUN: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """Dequantize a tile. Channels are `apart` elements from each other in the output; unless that is 1, the taps of a
    channel are adjacent."""
    n = tl.program_id(0) * R + tl.arange(0, R)
    k0 = tl.program_id(1) * K_TILE
    k = k0 + tl.arange(0, K_TILE)
    weights = _levels(w_ptr, scale_ptr, zero_ptr, n % N, k0, K, row_bytes, groups, RUN, BITS, K_TILE)
    if apart == 1:
        at = k
    else:
        at = k % C * apart + k // C
    pointers = y_ptr + n.to(tl.int64)[:, None] * K + at[None, :]
    tl.store(pointers, rounded_to(weights, y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def _dequantize_int8(w_ptr, scale_ptr, y_ptr, N, K, R: tl.constexpr, K_TILE: tl.constexpr):
    n = tl.program_id(0) * R + tl.arange(0, R)
    k = tl.program_id(1) * K_TILE + tl.arange(0, K_TILE)
    known = (n < N)[:, None] & (k < K)[None, :]
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
    weights = tl.load(w_ptr + at, mask=known, other=0).to(tl.float32) * scale
    tl.store(y_ptr + at, rounded_to(weights, y_ptr.dtype.element_ty), mask=known)


@triton.jit
def _channel_scales(
    w_ptr, scale_ptr, zero_ptr, s_ptr, sums_ptr, N, K, row_bytes, groups,
    RUN: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * R + tl.arange(0, R)
    largest = tl.zeros((R, K_TILE), dtype=tl.int32)
    for k0 in range(0, K, K_TILE):
        k = k0 + tl.arange(0, K_TILE)
        weights = _levels(w_ptr, scale_ptr, zero_ptr, n % N, k0, K, row_bytes, groups, RUN, BITS, K_TILE)
        largest = tl.maximum(largest, tl.where((k < K)[None, :], size_bits(weights), 0))
    scale = scale_of(tl.max(largest, 1))
    sums = tl.zeros((R, K_TILE), dtype=tl.int32)
    for k0 in range(0, K, K_TILE):
        k = k0 + tl.arange(0, K_TILE)
        weights = _levels(w_ptr, scale_ptr, zero_ptr, n % N, k0, K, row_bytes, groups, RUN, BITS, K_TILE)
        codes = nearest_code(tl.div_rn(weights, scale[:, None])).to(tl.int32)
        sums += tl.where((k < K)[None, :], codes, 0)
    tl.store(s_ptr + n, scale, mask=n < N)
    tl.store(sums_ptr + n, tl.sum(sums, 1), mask=n < N)


@triton.jit
def _requantize(
    w_ptr, scale_ptr, zero_ptr, s_ptr, q_ptr, N, K, row_bytes, groups,
    RUN: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * R + tl.arange(0, R)
    k0 = tl.program_id(1) * K_TILE
    k = k0 + tl.arange(0, K_TILE)
    weights = _levels(w_ptr, scale_ptr, zero_ptr, n % N, k0, K, row_bytes, groups, RUN, BITS, K_TILE)
    codes = nearest_code(tl.div_rn(weights, tl.load(s_ptr + n % N)[:, None]))
    pointers = q_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(pointers, codes, mask=(n < N)[:, None] & (k < K)[None, :])
