"""x W^T + b and x * W + b by implicit GEMM, in one Triton kernel, straight from packed weights.

    y[n, m] = sum_k W[n, k] X[k, m],    k over (tap, channel), channels fastest; m over (sample, output pixel)

X is never stored: row k of it is read from the channels-last input, where tap k // C of the window of pixel m falls, as
in cuDNN (Chetlur et al. 2014, "cuDNN", section 3). A linear layer is a convolution of one tap over samples of one
pixel. The weight is the left operand, because a tensor core can take that one from registers, where it is dequantized.


    16-bit inputs   W is (code - zero) scale, rounded to the dtype of x as in `Format.dequantize`; if a row has only one
                    scale, it multiplies the sum instead
    8-bit inputs    W is the 8-bit code w_q; 4-bit codes are requantized to it in the kernel. X is x_q - 128. The
                    padding is stored and has the value z - 128, so each pixel's sum has all of its K terms:
                    y = (sum_k (x_q - 128) w_q - (z - 128) sum_k w_q) (s_x s_w) + b, int32 up to the scales,
                    is rounded once
    float8 inputs   W and X are codes of e4m3; y = (sum_k x_q w_q) (s_x s_w) + b. Tensor cores add such products with
                    less precision than float32 (Liu et al. 2024, "DeepSeek-V3", section 3.3.2), so the sum of each step
                    is computed separately and added to the total with ordinary instructions

With `splits` > 1 each program sums a part of k into a workspace, and `_add_splits` adds the parts in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
import triton
import triton.language as tl

from bitpolicy.kernels.kernel import Geometry
from bitpolicy.kernels.triton.configs import Config
from bitpolicy.kernels.triton.tiles import (
    INTERPRETED,
    byte_tile,
    grid_tile,
    nearest_code,
    nibble_tile,
    over_groups,
    quotient,
    rounded_to,
    steps,
)

_GROUP = tl.constexpr(8)  # columns of tiles computed together, so that the weight's rows are read from L2


_TILE = 256  # sums that one program of the second pass adds


@dataclass(frozen=True)
class Rows:
    """A weight in the form that the kernel reads, rows (out, K) in storage order.

    Attributes:
        codes: int8 or float8 (out, K), or two 4-bit codes per byte, u8 (out, ceil(K / 2)).
        scale, zero: of the groups of 4-bit codes, shape (out, groups); a zero of None means 8.
        run: the group size; 0 means a whole row.
        channel_scale: float32 or float16, shape (out), the factor of the sum; None if there is none.
        code_sums: sum_k w_q, int32, shape (out), for 8-bit inputs.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    run: int = 0
    channel_scale: torch.Tensor | None = None
    code_sums: torch.Tensor | None = None

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == torch.uint8 else 8


@dataclass(frozen=True)
class Window:
    """The positions of a layer's taps, in three dimensions.

    Attributes:
        size: of the input, (D, H, W).
        kernel, stride, padding, dilation: those of the layer, with ones and zeros in front.
    """

    size: tuple[int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]

    @property
    def output(self) -> tuple[int, int, int]:
        """(OD, OH, OW)."""
        each = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        d, h, w = ((size + 2 * pad - apart * (taps - 1) - 1) // step + 1 for size, taps, step, pad, apart in each)
        return d, h, w

    @property
    def padded(self) -> Window:
        """The same window over an input that includes its padding."""
        d, h, w = (size + 2 * pad for size, pad in zip(self.size, self.padding, strict=True))
        return replace(self, size=(d, h, w), padding=(0, 0, 0))


ONE_PIXEL = Window((1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1))


def window(spatial: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> Window:
    """The window of a convolution with one to three dimensions."""
    return Window(
        three(spatial, 1),
        three(kernel, 1),
        three(geometry.stride, 1),
        three(geometry.padding, 0),
        three(geometry.dilation, 1),
    )


def three(sizes: Sequence[int], fill: int) -> tuple[int, int, int]:
    """Extend the sizes of one to three dimensions to three."""
    d, h, w = (fill,) * (3 - len(sizes)) + tuple(sizes)
    return d, h, w


def launch(
    x: torch.Tensor,
    grid: tuple[torch.Tensor, torch.Tensor | None] | None,
    weight: Rows,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    place: Window,
    config: Config,
) -> None:
    """Write the product into `y`.

    Args:
        x: float16, bfloat16, int8 or float8, contiguous, in any shape equivalent to (samples, D, H, W, C).
        grid: for 8-bit inputs, which are padded: s_x, float32, and for integers z - 128, int32, per sample or row.
        y: shape (samples, pixels, out), with any strides.
    """
    samples, pixels, out = y.shape
    channels = x.numel() // (samples * prod(place.size))
    length = channels * prod(place.kernel)
    rows = samples * pixels
    integer = x.dtype == torch.int8
    partial = None
    if config.splits > 1:
        partial = torch.empty(
            (config.splits, rows, out), device=x.device, dtype=torch.int32 if integer else torch.float32
        )
    x_scale, x_zero = (None, None) if grid is None else grid
    each = x_scale is not None and x_scale.numel() == rows
    programs = (triton.cdiv(rows, config.bm) * triton.cdiv(out, config.bn), config.splits)
    _product[programs](
        x, weight.codes, weight.scale, weight.zero,
        weight.channel_scale, weight.code_sums, x_scale, x_zero, bias, y, partial,
        rows, out, length, channels, *place.size, *place.output, pixels, *y.stride(),
        weight.codes.stride(0), 1 if weight.scale is None or weight.run == 0 else weight.scale.shape[1],
        *place.kernel, *place.stride, *place.padding, *place.dilation,
        BITS=weight.bits, RUN=weight.run, INTEGER=integer, EACH=each, SPLITS=config.splits,
        PADDED=any(place.padding), EVEN=channels % config.bk == 0,
        BN=config.bn, BM=config.bm, BK=config.bk,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=not integer,
    )  # fmt: skip
    if partial is not None:
        _add_splits[(triton.cdiv(rows * out, _TILE),)](
            partial, weight.channel_scale, weight.code_sums, x_scale, x_zero, bias, y,
            rows * out, out, pixels, *y.stride(),
            EACH=each, SPLITS=config.splits, TILE=_TILE, enable_fp_fusion=not integer,
        )  # fmt: skip


@triton.jit
def _product(
    x_ptr, w_ptr, scale_ptr, zero_ptr, ws_ptr, sums_ptr, xs_ptr, xz_ptr, bias_ptr, y_ptr, partial_ptr,
    M, N, K, C, D, H, W, OD, OH, OW, pixels, y_sample, y_pixel, y_channel, row_bytes, groups,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    LD: tl.constexpr, LH: tl.constexpr, LW: tl.constexpr,
    BITS: tl.constexpr, RUN: tl.constexpr, INTEGER: tl.constexpr, EACH: tl.constexpr, SPLITS: tl.constexpr,
    PADDED: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile_n, tile_m = _tile_of(tl.program_id(0), N, M, BN, BM)
    n = tile_n * BN + tl.arange(0, BN)
    m = tile_m * BM + tl.arange(0, BM)
    rows = n % N  # rows past the end repeat others and are not stored
    sample = (m % M) // pixels
    pixel = (m % M) % pixels
    d = pixel // (OH * OW) * SD - PD  # where the window of each pixel starts
    h = pixel // OW % OH * SH - PH
    w = pixel % OW * SW - PW
    corner = (((sample * D + d) * H + h) * W + w) * C

    if INTEGER and BITS == 4:
        s_w = tl.load(ws_ptr + rows)[:, None]
        reciprocal = tl.div_rn(1.0, s_w)
    else:
        s_w = 1.0
        reciprocal = 1.0
    part = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    start = tl.program_id(1) * part
    tap = start // C
    channel = start % C
    scale, zero = _grids(scale_ptr, zero_ptr, rows, start, groups, BITS, RUN, INTEGER, BK)
    FLOAT8: tl.constexpr = x_ptr.dtype.element_ty == tl.float8e4nv
    acc = tl.zeros((BN, BM), dtype=tl.int32 if INTEGER else tl.float32)
    for k0 in range(start, min(start + part, K), BK):
        if EVEN:
            inputs = _tile_of_tap(
                x_ptr, corner, d, h, w, tap, channel, C, D, H, W, KD, KH, KW, LD, LH, LW, PADDED, BK
            )  # fmt: skip
            channel += BK
            tap += tl.where(channel == C, 1, 0)
            channel = tl.where(channel == C, 0, channel)
        else:
            inputs = _tile_of_taps(x_ptr, corner, d, h, w, k0, K, C, D, H, W, KH, KW, LD, LH, LW, PADDED, BK)
        if BITS == 8:
            codes = byte_tile(w_ptr, rows, k0, K, row_bytes, EVEN, BK)
            weights = codes if INTEGER else _widened(codes, inputs)
        else:
            codes = nibble_tile(w_ptr, rows, k0, row_bytes, EVEN, BK)
            weights = _weights(codes, scale, zero, s_w, reciprocal, inputs, RUN, INTEGER)
            if RUN > 0:  # loaded one step ahead, as loads this small are not pipelined
                scale, zero = _grids(scale_ptr, zero_ptr, rows, k0 + BK, groups, BITS, RUN, INTEGER, BK)
        if INTERPRETED and not INTEGER:
            inputs = inputs.to(tl.float32)
        if FLOAT8:  # zero inexact additions allowed, so the compiler keeps the sum separate
            acc += tl.dot(weights, tl.trans(inputs), max_num_imprecise_acc=BK, out_dtype=acc.dtype)
        else:
            acc = tl.dot(weights, tl.trans(inputs), acc, out_dtype=acc.dtype)

    stored = (n < N)[:, None] & (m < M)[None, :]
    if SPLITS > 1:
        at = (tl.program_id(1).to(tl.int64) * M + m[None, :]) * N + n[:, None]
        tl.store(partial_ptr + at, acc, mask=stored)
    else:
        place = (m % M if EACH else sample)[None, :]
        y = _finished(acc, n[:, None], place, ws_ptr, sums_ptr, xs_ptr, xz_ptr, bias_ptr, (n < N)[:, None])
        at = sample.to(tl.int64) * y_sample + pixel.to(tl.int64) * y_pixel
        tl.store(
            y_ptr + at[None, :] + n.to(tl.int64)[:, None] * y_channel,
            rounded_to(y, y_ptr.dtype.element_ty),
            mask=stored,
        )


@triton.jit
def _tile_of(program, N, M, BN: tl.constexpr, BM: tl.constexpr):
    """The position of a program's tile: a few columns of tiles at a time, down all rows."""
    down = tl.cdiv(N, BN)
    across = tl.cdiv(M, BM)
    first = program // (_GROUP * down) * _GROUP
    columns = tl.minimum(across - first, _GROUP)
    within = program % (_GROUP * down)
    return within // columns, first + within % columns


@triton.jit
def _grids(
    scale_ptr, zero_ptr, rows, k0, groups,
    BITS: tl.constexpr, RUN: tl.constexpr, INTEGER: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Scales and zero points of the groups that a tile at k0 overlaps."""
    if BITS == 8:
        scale = 1.0
        zero = 8
    else:
        scale = grid_tile(scale_ptr, rows, k0, groups, RUN, BK)
        if zero_ptr is None:
            zero = tl.full(scale.shape, 8, tl.int32)
        else:
            zero = grid_tile(zero_ptr, rows, k0, groups, RUN, BK)
    return scale, zero


@triton.jit
def _weights(
    codes, scale, zero, s_w, reciprocal, inputs,
    RUN: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    """A tile of 4-bit codes in the form that the tensor core takes."""
    if INTEGER:
        values = steps(codes, over_groups(zero, codes), True) * over_groups(scale.to(tl.float32), codes)
        return nearest_code(quotient(values, s_w, reciprocal))
    else:
        WIDE: tl.constexpr = inputs.dtype == tl.bfloat16
        values = steps(codes, over_groups(zero, codes), WIDE)
        if RUN > 0:
            values = values * over_groups(scale.to(values.dtype), codes)
        return _widened(rounded_to(values, inputs.dtype), inputs)


@triton.jit
def _widened(codes, inputs):
    """8-bit codes in the dtype of the inputs, which represents them exactly."""
    return codes.to(tl.float32) if INTERPRETED else codes.to(inputs.dtype)


@triton.jit
def _tile_of_tap(
    x_ptr, corner, d, h, w, tap, channel, C, D, H, W,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    LD: tl.constexpr, LH: tl.constexpr, LW: tl.constexpr,
    PADDED: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BK channels of one tap of the windows of some pixels, shape (pixels, BK)."""
    if KD * KH * KW == 1:
        td = 0
        th = 0
        tw = 0
    else:
        td = tap // (KH * KW) * LD
        th = tap // KW % KH * LH
        tw = tap % KW * LW
    at = tl.multiple_of(corner + (((td * H + th) * W + tw) * C + channel), BK)  # true of every term
    pointers = x_ptr + at[:, None] + tl.arange(0, BK)[None, :]
    if PADDED:
        return tl.load(pointers, mask=_inside(d + td, h + th, w + tw, D, H, W, KD)[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _tile_of_taps(
    x_ptr, corner, d, h, w, k0, K, C, D, H, W,
    KH: tl.constexpr, KW: tl.constexpr, LD: tl.constexpr, LH: tl.constexpr, LW: tl.constexpr,
    PADDED: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Places k0 ... k0 + BK - 1 of the windows of some pixels, shape (pixels, BK), in any taps; zeros past the end."""
    k = (k0 + tl.arange(0, BK))[None, :]
    tap = k // C
    td, th, tw = tap // (KH * KW) * LD, tap // KW % KH * LH, tap % KW * LW
    inside = k < K
    if PADDED:
        inside = inside & _inside(d[:, None] + td, h[:, None] + th, w[:, None] + tw, D, H, W, 0)
    return tl.load(x_ptr + corner[:, None] + ((td * H + th) * W + tw) * C + k % C, mask=inside, other=0.0)


@triton.jit
def _inside(d, h, w, D, H, W, KD: tl.constexpr):
    """Whether a position is in the input, not in its padding. One comparison per dimension, since -1 is 2^32 - 1."""
    plane = (h.to(tl.uint32) < tl.cast(H, tl.uint32)) & (w.to(tl.uint32) < tl.cast(W, tl.uint32))
    return plane if KD == 1 else plane & (d.to(tl.uint32) < tl.cast(D, tl.uint32))


@triton.jit
def _finished(sums, n, place, ws_ptr, sums_ptr, xs_ptr, xz_ptr, bias_ptr, known):
    """(sum - z sum_k w_q) (s_x s_w) + b in float32, with absent terms left out; `place` is the index of s_x and z."""
    if xz_ptr is not None:
        sums = sums - tl.load(xz_ptr + place) * tl.load(sums_ptr + n, mask=known, other=0)
    y = sums.to(tl.float32)
    if xs_ptr is not None:
        y = y * (tl.load(xs_ptr + place) * tl.load(ws_ptr + n, mask=known, other=0.0).to(tl.float32))
    elif ws_ptr is not None:
        y = y * tl.load(ws_ptr + n, mask=known, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, mask=known, other=0.0).to(tl.float32)
    return y


@triton.jit
def _add_splits(
    partial_ptr, ws_ptr, sums_ptr, xs_ptr, xz_ptr, bias_ptr, y_ptr, size, N, pixels, y_sample, y_pixel, y_channel,
    EACH: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add the parts of each sum, first to last, and finish it."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    known = i < size
    sums = tl.load(partial_ptr + i, mask=known, other=0)
    for part in range(1, SPLITS):
        sums += tl.load(partial_ptr + i + part * tl.cast(size, tl.int64), mask=known, other=0)
    m, n = i // N, i % N
    sample, pixel = m // pixels, m % pixels
    place = tl.where(known, m if EACH else sample, 0)
    y = _finished(sums, n, place, ws_ptr, sums_ptr, xs_ptr, xz_ptr, bias_ptr, known)
    tl.store(
        y_ptr + sample * y_sample + pixel * y_pixel + n * y_channel, rounded_to(y, y_ptr.dtype.element_ty), mask=known
    )
