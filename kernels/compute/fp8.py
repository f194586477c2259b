"""FP8 activation quantization: the definition that every FP8 kernel follows, and its reference in plain torch code.

    s_x = max|x| / 448 over the values that share a scale,    x_q = e4m3(clamp(x / s_x, -448, 448)), to nearest
    W   = s_w[out] w_q: the codes of `fp8` or `fp8-tensor` as they are stored
    y   = (sum_k x_q w_q) (s_x s_w) + b,    in float32, sums in any order, rounded once to x's dtype

Scales are shared as in `bitpolicy.kernels.compute.int8`: by a row, by a pixel if the convolution has one tap, or by a
sample. There is no zero point: the precision of float8 is relative, so unused codes of one sign take no precision from
other values. An all-zero set has s_x = 1; a set with a NaN or an infinite value gives NaN. e4m3 and the scale that puts
the largest value at 448: Micikevicius et al. 2022, "FP8 formats for deep learning", section 3. Products of two codes
are exact in float32.

Only weights stored as `fp8` or `fp8-tensor` are multiplied this way. Other formats would have to be rounded again, to
three bits of mantissa; for `int8` that error is several times its own. `suits` leaves them, and layers whose shape does
not suit 8-bit inputs, in FLOAT.
"""

from __future__ import annotations

import torch

from bitpolicy.kernels.compute import int8 as int8_compute
from bitpolicy.kernels.compute.int8 import multiply, scaled, shared
from bitpolicy.kernels.formats.elements import E4M3
from bitpolicy.kernels.formats.named import FP8, FP8_TENSOR
from bitpolicy.kernels.kernel import PackedWeight

CODE = torch.float8_e4m3fn
FORMATS = (FP8, FP8_TENSOR)


def suits(weight: PackedWeight) -> bool:
    """Whether this layer rounds its inputs to float8 when FP8 is requested. Depends on its format and shape."""
    return weight.format in FORMATS and int8_compute.suits(weight)


def quantize_input(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """x_q as float32 (NaN where x has no finite scale) and s_x, float32, of size 1 along `dims`.

    Args:
        x: float, shape (..., in) or (B, in, *spatial).
        dims: the dimensions that share a scale, from `int8_compute.shared`.
    """
    x = x.float()
    if not x.numel():
        top = x.sum(dims, keepdim=True)
    else:
        top = torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))
    scale = top / E4M3.largest
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return E4M3.nearest(x / scale), scale  # clamps: a subnormal s_x can be much too small


def fp8_product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """y, computed with plain torch code."""
    codes, scale = quantize_input(x, shared(x.ndim, weight.shape, weight.geometry))
    sums = multiply(codes, weight.tensors["weight_packed"].float(), weight.geometry)
    s_w = weight.tensors["weight_scale"].expand(weight.shape[0])
    return scaled(sums, scale, s_w, bias, weight.geometry).to(x.dtype)
