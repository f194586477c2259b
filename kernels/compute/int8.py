"""INT8 activation quantization: the definition that every INT8 kernel follows, and its reference in plain torch code.

    lo, hi = the minimum and maximum x over the values that share a scale (`shared`), zero included
    s_x = hi / 255 - lo / 255,    z = min(round(-lo / s_x), 255),    x_q = clamp(round(x / s_x) + z, 0, 255)
    W  ~ s_w[out] w_q, w_q in [-127, 127]: the codes of `int8` as they are stored; every other format is requantized
         once, to nearest, with s_w = max|W| / 127 of each output channel
    y  = (sum_k (x_q - z) w_q) (s_x s_w) + b,    the sum in integers, the rest in float32, rounded once to x's dtype

A scale and its zero point are shared by a row of a linear layer's input, by a pixel if the convolution has one tap (it
is then a linear layer over its pixels), and by a sample of any other convolution's input. So a result never depends on
the rest of the batch. The padding of a convolution has the code z. A set without range has s_x = 1; a set with a NaN or
an infinite value gives NaN. Source of the scheme: Jacob et al. 2018, sections 2.1 and 2.3; scales taken at run time,
one per token, are those of Dettmers et al. 2022, "LLM.int8()", section 3.1. There are zero points because the output of
SiLU is hardly ever negative: symmetric codes would leave half of their range unused.

Convolutions with several groups and very short rows are not worth quantizing. `suits` decides by shape alone, so the
numbers never depend on which kernel was fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.nn.functional import conv1d, conv2d, conv3d

from bitpolicy.kernels.formats.named import INT8
from bitpolicy.kernels.kernel import Geometry, PackedWeight

TOP = 255  # largest code of an input
_SHORTEST = 32  # weights in a row; for shorter rows, the scales cost as much as the product
_CONVOLVE = {1: conv1d, 2: conv2d, 3: conv3d}


def suits(weight: PackedWeight) -> bool:
    """Whether a layer of this shape rounds its inputs to 8 bits when INT8 is requested; others stay exact."""
    one_group = weight.geometry is None or weight.geometry.groups == 1
    return one_group and weight.row_length >= _SHORTEST


def weight_codes(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """w_q, int8, shape `weight.shape`, and s_w, float32, shape (out)."""
    if weight.format == INT8:
        return weight.tensors["weight_packed"], weight.tensors["weight_scale"]
    stored = INT8.quantize(weight.dequantize(torch.float32))
    return stored["weight_packed"], stored["weight_scale"]


def shared(ndim: int, shape: Sequence[int], geometry: Geometry | None) -> tuple[int, ...]:
    """The dimensions of an input over which a scale is shared.

    Args:
        ndim: of the input, (..., in) or (B, in, *spatial).
        shape, geometry: of the weight.
    """
    if geometry is None:
        return (-1,)
    return (1,) if takes_pixels(shape, geometry) else tuple(range(1, ndim))


def takes_pixels(shape: Sequence[int], geometry: Geometry) -> bool:
    """Whether a convolution multiplies each pixel on its own: one tap, no stride, no padding."""
    return prod(shape[2:]) == 1 and max(geometry.stride) == 1 and max(geometry.padding) == 0


def input_grid(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """s_x and z of a float input, float32, of size 1 along the `shared` dimensions."""
    x = x.float()
    if not x.numel():
        lo = hi = x.sum(dims, keepdim=True)
    else:
        lo, hi = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
    scale = hi / TOP - lo / TOP
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (-lo / scale).round_().clamp_(max=TOP)  # a subnormal s_x can be much too small


def quantize_input(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """x_q - z, float32 whole numbers (NaN where x has no finite scale), and s_x, as in `input_grid`.

    Args:
        x: float, shape (..., in) or (B, in, *spatial).
        dims: the `shared` dimensions.
    """
    scale, zero = input_grid(x, dims)
    return (x.float() / scale).round_().add_(zero).clamp_(0, TOP).sub_(zero), scale


def int8_product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """y, computed with plain torch code. Sums are float64, exact up to 2^53 / (255 x 127) products."""
    steps, scale = quantize_input(x, shared(x.ndim, weight.shape, weight.geometry))
    w, s_w = weight_codes(weight)
    sums = multiply(steps.double(), w.double(), weight.geometry).float()
    return scaled(sums, scale, s_w, bias, weight.geometry).to(x.dtype)


def scaled(
    sums: torch.Tensor, s_x: torch.Tensor, s_w: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry | None
) -> torch.Tensor:
    """sums (s_x s_w) + b in float32.

    Args:
        sums: of products of codes, float32, in the shape of torch's own output.
        s_x: of size 1 along the `shared` dimensions of the input.
    """
    channels = s_w if geometry is None else s_w.view(-1, *[1] * len(geometry.stride))
    y = sums * (s_x * channels)
    return y if bias is None else y + bias.float().view(channels.shape)


def multiply(
    x: torch.Tensor, w: torch.Tensor, geometry: Geometry | None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + b, or x * W + b, with torch."""
    if geometry is None:
        return torch.nn.functional.linear(x, w, bias)
    convolve = _CONVOLVE[len(geometry.stride)]
    return convolve(x, w, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
