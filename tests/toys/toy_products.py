"""Calls of packed layers for kernels to take: shapes that divide nothing evenly, and values that are awkward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Geometry, PackedWeight


@dataclass(frozen=True)
class Shape:
    """A layer and its input.

    Attributes:
        input: (..., in) or (B, in, *spatial).
        weight: (out, in/groups, *kernel).
        geometry: of a convolution.
    """

    input: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry | None = None


def _slides(dims: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1) -> Geometry:
    return Geometry((stride,) * dims, (padding,) * dims, (dilation,) * dims, groups)


SHAPES: dict[str, Shape] = {
    "linear of one row": Shape((67,), (5, 67)),
    "linear of odd sizes": Shape((2, 3, 67), (5, 67)),
    "linear of a group and a half": Shape((7, 96), (33, 96)),
    "linear of a few rows": Shape((3, 2, 200), (37, 200)),
    "linear of whole groups": Shape((33, 128), (48, 128)),
    "linear of many rows": Shape((2, 65, 192), (130, 192)),
    "linear of no rows": Shape((0, 64), (6, 64)),
    "conv1d": Shape((2, 36, 19), (10, 36, 3), _slides(1, padding=1)),
    "conv1d with stride and dilation": Shape((1, 64, 30), (8, 64, 3), _slides(1, 2, 2, 2)),
    "conv2d 1x1": Shape((3, 72, 5, 6), (20, 72, 1, 1), _slides(2)),
    "conv2d 3x3": Shape((2, 64, 9, 7), (40, 64, 3, 3), _slides(2, padding=1)),
    "conv2d 3x3 of few channels": Shape((1, 5, 8, 8), (4, 5, 3, 3), _slides(2, padding=1)),
    "conv2d 3x3 with stride": Shape((2, 33, 9, 8), (17, 33, 3, 3), _slides(2, 2, 1)),
    "conv2d 3x3 with dilation": Shape((1, 48, 11, 10), (6, 48, 3, 3), _slides(2, 1, 2, 2)),
    "conv2d 1x3": Shape((1, 64, 6, 9), (8, 64, 1, 3), Geometry((1, 2), (0, 1), (1, 1))),
    "conv2d in groups": Shape((2, 64, 6, 6), (12, 32, 3, 3), _slides(2, padding=1, groups=2)),
    "conv2d of a channel each": Shape((2, 6, 6, 6), (6, 1, 3, 3), _slides(2, padding=1, groups=6)),
    "conv2d of no samples": Shape((0, 64, 4, 4), (6, 64, 3, 3), _slides(2, padding=1)),
    "conv3d": Shape((1, 16, 3, 6, 5), (7, 16, 3, 3, 3), _slides(3, padding=1)),
    "conv3d 1x3x3": Shape((2, 32, 3, 5, 5), (8, 32, 1, 3, 3), Geometry((1, 2, 2), (0, 1, 1), (1, 1, 1))),
}
TRIED = list(SHAPES)
"""Shapes whose products are compared; fewer in an interpreter."""

DTYPES_OF: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(SHAPES, (torch.float32, torch.float16, torch.bfloat16))
"""Dtypes of the input of each shape; `interpreted_triton`, where a product takes seconds, leaves fewer."""

_GROUPED = "int4 int4-g32 int4-g128-sym int4-channel int8-g64-asym int3 int6-channel-sym int4-rot"
_FLOATS = "nf4 fp8 fp8-tensor mxfp4 mxfp8 nvfp4"
FORMATS = tuple(format_named(name) for name in f"{_GROUPED} int8 {_FLOATS}".split())


def weight_of(name: str, format_name: str, low_memory: bool = False) -> PackedWeight | None:
    """A packed weight for a shape, its values alike to those of trained layers; None where the format does not fit."""
    shape, format = SHAPES[name], format_named(format_name)
    if not format.fits(shape.weight):
        return None
    return PackedWeight(format, shape.weight, format.quantize(_values(shape)), shape.geometry, low_memory)


def _values(shape: Shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape.weight, generator=generator)
    spread = torch.rand(shape.weight[0], generator=generator).view(-1, *[1] * (len(shape.weight) - 1)) + 0.2
    return weight * spread / max(1, weight[0].numel()) ** 0.5


def input_of(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values that have a mean, as activations do."""
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(SHAPES[name].input, generator=generator) + 0.3).to(dtype)


def bias_of(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPES[name].weight[0], generator=torch.Generator().manual_seed(3)).to(dtype)


def layouts(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The same values, lying in other ways."""
    yield "contiguous", x
    if x.ndim == 4:
        yield "channels last", x.contiguous(memory_format=torch.channels_last)
    if x.ndim > 1:
        yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
        yield "every second", torch.stack([x, x + 1], dim=-1)[..., 0]
