"""Parts of Triton kernels: tiles of packed weights, and rounding as `bitpolicy.kernels.compute.int8` defines it.

Every tile has rows of the weight (dimension 0) and positions k along them (dimension 1), in storage order. Codes become
floats without a conversion instruction: the bits of 1024 + c in float16, or of 2^23 + c in float32, have c in their
lowest byte. In the same way a float in [-127, 127] is rounded to nearest, ties to even, and cast: adding 1.5 * 2^23
leaves its code in the lowest byte of the sum (Warren, "Hacker's Delight", section 17-1).

Triton's interpreter rounds a fused multiply-add twice, truncates bfloat16 instead of rounding it, and does not support
bfloat16 arithmetic. `INTERPRETED` selects code that avoids this.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def nibble_tile(w_ptr, rows, k0, row_bytes, EVEN: tl.constexpr, BK: tl.constexpr):
    """4-bit codes, uint8, of the positions k0 ... k0 + BK - 1; zeros past the end. k0 is even."""
    at = k0 // 2 + tl.arange(0, BK // 2)
    pointers = w_ptr + rows[:, None] * row_bytes + at[None, :]
    if EVEN:
        packed = tl.load(pointers)
    else:
        packed = tl.load(pointers, mask=(at < row_bytes)[None, :], other=0)
    return tl.reshape(tl.join(packed & 0xF, packed >> 4), (packed.shape[0], BK))


@triton.jit
def byte_tile(w_ptr, rows, k0, K, row_bytes, EVEN: tl.constexpr, BK: tl.constexpr):
    """8-bit codes of the positions k0 ... k0 + BK - 1, in their stored dtype; zeros past the end."""
    k = k0 + tl.arange(0, BK)
    pointers = w_ptr + rows[:, None] * row_bytes + k[None, :]
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=(k < K)[None, :], other=0.0)


@triton.jit
def grid_tile(
    grid_ptr,
    rows,
    k0,
    groups,
    RUN: tl.constexpr,
    BK: tl.constexpr,
):
    """Scales or zero points of the groups that a tile overlaps, shape (rows, 1 or BK / RUN); RUN 0 is a whole row."""
    if RUN == 0:
        return tl.load(grid_ptr + rows)[:, None]
    else:
        MET: tl.constexpr = BK // RUN if BK > RUN else 1
        group = tl.minimum(k0 // RUN + tl.arange(0, MET), groups - 1)
        return tl.load(grid_ptr + rows[:, None] * groups + group[None, :])


@triton.jit
def over_groups(grid, like):
    """The result of `grid_tile`, or a number derived from it, broadcast to every position of a tile."""
    if grid.shape[1] == 1:
        return tl.broadcast_to(grid, like.shape)
    else:
        RUN: tl.constexpr = like.shape[1] // grid.shape[1]
        spread = tl.broadcast_to(grid[:, :, None], (grid.shape[0], grid.shape[1], RUN))
        return tl.reshape(spread, like.shape)


@triton.jit
def steps(codes, zero, WIDE: tl.constexpr):
    """code - zero, exact: float32 if WIDE, else float16. Codes are uint8; zero has a matching shape or is a number."""
    if WIDE:
        raised = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
        return raised - (zero.to(tl.float32) + 8388608.0)
    else:
        raised = (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
        return raised - (zero.to(tl.float16) + 1024.0).to(tl.float16)


@triton.jit
def nearest_code(v):
    """v in [-127.5, 127.5] rounded to nearest, ties to even, int8."""
    return (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def nearest_float8(v):
    """v, clamped to [-448, 448], rounded to the nearest e4m3, ties to even; arbitrary for NaN.

    Works on the bits, like `nearest_code`: below 2^-6 levels are 2^-9 apart. On Ada, Triton's own cast first truncates
    to float16.
    """
    v = tl.minimum(tl.maximum(v, -448.0), 448.0)
    bits = size_bits(v)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1) - (120 << 23)) >> 20
    small = (bits.to(tl.float32, bitcast=True) + 24576.0).to(tl.int32, bitcast=True) & 0xF
    sign = (v.to(tl.int32, bitcast=True) >> 24) & 0x80
    code = tl.where(bits < (121 << 23), small, normal) | sign
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def quotient(p, s, reciprocal):
    """p / s to nearest in float32, given `reciprocal` = 1 / s to nearest.

    Two corrections by the exact remainder (Markstein 1990, theorem 4) are cheaper than a division for every weight.
    """
    if INTERPRETED:
        return tl.div_rn(p, s)
    else:
        q = p * reciprocal
        q = tl.fma(tl.fma(-q, s, p), reciprocal, q)
        return tl.fma(tl.fma(-q, s, p), reciprocal, q)


@triton.jit
def size_bits(x):
    """|x| of a float32 as an integer with the same order: NaN is above infinity, which is above everything else."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(bits):
    """s = max|x| / 127, given the maximum from `size_bits`; 1 if it is zero, NaN if it is not finite."""
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)
    return tl.where(bits >= 0x7F800000, float("nan"), tl.where(scale == 0.0, 1.0, scale))


@triton.jit
def rounded_to(x, dtype: tl.constexpr):
    """A float32 rounded to nearest. The interpreter would truncate bfloat16 and turn some nonzero values into zero."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        return (tl.where(x == x, nearest, 0x7FC00000) >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        return x.to(dtype)
