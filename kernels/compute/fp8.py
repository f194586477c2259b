"""Compute with float8 inputs, as every FP8 kernel of this package does it: definition and plain torch reference.

    s_x = max|x| / 448 of those that share a scale,    x_q = e4m3(clamp(x / s_x, -448, 448)), to nearest
    W   = s_w[out] w_q: the codes of `fp8` as they are stored
    y   = (sum_k x_q w_q) (s_x s_w) + b,    sums in float32, in any order, the rest too, rounded once to x's dtype

Who shares a scale is the same as in `bitpolicy.kernels.compute.int8`: a row, a pixel where a convolution has one tap, a
sample. There is no zero point: the precision of float8 is relative, so that codes of a sign that never comes cost no
other value anything. A set of zeros has s_x = 1; one with a NaN or an infinite value gives NaN. e4m3 and the scale that
puts the largest value at 448: Micikevicius et al. 2022, "FP8 formats for deep learning", section 3. Products of two
codes are exact in float32.

Only weights that are stored as `fp8` are multiplied so. Those of other formats would have to be rounded once more, to
three bits of mantissa: of `int8` that is several times its own error. `suits` leaves them, and layers whose shape does
not suit 8-bit inputs, to FLOAT compute.
"""

from __future__ import annotations

import torch

from bitpolicy.kernels.compute import int8 as int8_compute
from bitpolicy.kernels.compute.int8 import multiply, scaled, shared
from bitpolicy.kernels.formats.float_codes import LARGEST
from bitpolicy.kernels.formats.named import FP8
from bitpolicy.kernels.kernel import PackedWeight

CODE = torch.float8_e4m3fn


def suits(weight: PackedWeight) -> bool:
    """Whether this layer multiplies float8 inputs where FP8 compute is asked for: by its format and its shape."""
    return weight.format == FP8 and int8_compute.suits(weight)


def quantize_input(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """x_q as float32 (NaN where x has no finite scale) and s_x, float32, of a size 1 along `dims`.

    Args:
        x: float, shape (..., in) or (B, in, *spatial).
        dims: those that share a scale, as `int8_compute.shared` says.
    """
    x = x.float()
    if not x.numel():
        top = x.sum(dims, keepdim=True)
    else:
        top = torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))
    scale = top / LARGEST
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (x / scale).clamp_(-LARGEST, LARGEST)  # a subnormal s_x may be far less than it should be
    return codes.to(CODE).float(), scale


def fp8_product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """y by plain torch code."""
    codes, scale = quantize_input(x, shared(x.ndim, weight.shape, weight.geometry))
    sums = multiply(codes, weight.tensors["weight_packed"].float(), weight.geometry)
    return scaled(sums, scale, weight.tensors["weight_scale"], bias, weight.geometry).to(x.dtype)
