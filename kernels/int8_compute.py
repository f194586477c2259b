"""Compute in 8 bits, as every INT8 kernel of this package does it: definition and plain torch reference.

    s_x = max|x| / 127 of each row of a linear layer's input, of each sample of a convolution's
    x_q = clamp(round(x / s_x), -127, 127)
    W  ~ s_w[out] w_q, w_q in [-127, 127]: the codes of `int8` as they are stored; those of every other format are
         requantized once, to nearest, with s_w = max|W| / 127 of each output channel
    y  = (sum_k x_q w_q) (s_x s_w) + b,    the sum in integers, the rest in float32, rounded once to the dtype of x

Scales of a whole sample make the result independent of what else is in the batch. A row or sample without range has
s_x = 1; one with a NaN or an infinite value gives NaN. Source of the scheme: Jacob et al. 2018, section 2; scales taken
at run time, a token each, are those of Dettmers et al. 2022, "LLM.int8()", section 3.1.

Convolutions of several groups and very short rows are not worth it: `suits` says which layers are, by shape alone, so
that the numbers never depend on which kernel was fastest.
"""

from __future__ import annotations

import torch
from torch.nn.functional import conv1d, conv2d, conv3d

from bitpolicy.kernels.formats import INT8
from bitpolicy.kernels.kernel import Geometry, PackedWeight

TOP = 127
_SHORTEST = 32  # weights of a row; below, the scales cost as much as the product
_CONVOLVE = {1: conv1d, 2: conv2d, 3: conv3d}


def suits(weight: PackedWeight) -> bool:
    """Whether a layer of this shape multiplies 8-bit inputs where INT8 compute is asked for; others stay exact."""
    one_group = weight.geometry is None or weight.geometry.groups == 1
    return one_group and weight.row_length >= _SHORTEST


def weight_codes(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """w_q, int8, shape `weight.shape`, and s_w, float32, shape (out)."""
    if weight.format == INT8:
        return weight.tensors["weight_packed"], weight.tensors["weight_scale"]
    stored = INT8.quantize(weight.dequantize(torch.float32))
    return stored["weight_packed"], stored["weight_scale"]


def quantize_input(x: torch.Tensor, per_sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x_q, float32 whole numbers (NaN where x has no finite scale), and s_x, float32, of a size 1 where it is shared.

    Args:
        x: float, shape (..., in), or (B, in, *spatial) if `per_sample`.
        per_sample: one scale for each of the first dimension, as convolutions have it; else one for each last row.
    """
    x = x.float()
    dims = tuple(range(1, x.ndim)) if per_sample else (-1,)
    largest = x.abs().amax(dims, keepdim=True) if x.numel() else x.new_zeros([1] * x.ndim)
    scale = largest / TOP
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x / scale).round_().clamp_(-TOP, TOP), scale


def rounded_input(x: torch.Tensor, per_sample: bool) -> torch.Tensor:
    """The input as an INT8 kernel sees it: s_x x_q, in the dtype of `x`."""
    codes, scale = quantize_input(x, per_sample)
    return (codes * scale).to(x.dtype)


def int8_product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """y by plain torch code. Sums are taken in float64, which holds every sum of 2^53 / 127^2 products exactly."""
    codes, scale = quantize_input(x, per_sample=weight.geometry is not None)
    w, s_w = weight_codes(weight)
    sums = multiply(codes.double(), w.double(), weight.geometry).float()
    channels = s_w if weight.geometry is None else s_w.view(-1, *[1] * len(weight.geometry.stride))
    y = sums * (scale * channels)
    if bias is not None:
        y = y + (bias.float() if weight.geometry is None else bias.float().view(channels.shape))
    return y.to(x.dtype)


def multiply(
    x: torch.Tensor, w: torch.Tensor, geometry: Geometry | None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + b, or x * W + b, by torch."""
    if geometry is None:
        return torch.nn.functional.linear(x, w, bias)
    convolve = _CONVOLVE[len(geometry.stride)]
    return convolve(x, w, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
