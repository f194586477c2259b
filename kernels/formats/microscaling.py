"""`mxfp8` and `mxfp4`: the Microscaling formats of the Open Compute Project, e4m3 or e2m1 codes in blocks of 32.

    w ~ 2^e code,    e = ceil(log2(max|w| / largest)) of each block,    e in [-127, 127]

The scale is an e8m0 number, one byte: a power of two (OCP Microscaling Formats Specification v1.0, sections 5.2 to
5.4). The specification leaves the choice of e to implementations. Its example, section 6.3, rounds down, which clips
the largest weights of most blocks. This is NVIDIA's rule, which rounds up and clips nothing: cuBLAS documentation, "1D
block scaling for FP8 and FP4 data types", and the instruction `cvt.rp.satfinite.ue8m0x2.f32`. A block of zeros has the
smallest scale, 2^-127.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.formats.elements import E4M3, Element
from bitpolicy.kernels.formats.format import Shape, TensorSpec
from bitpolicy.kernels.formats.grid import Grid, GridFormat
from bitpolicy.kernels.formats.packing import row_length

BLOCK = 32
_BIAS = 127  # of an e8m0 number


@dataclass(frozen=True)
class Microscaled(GridFormat):
    """One power of two for each block along the storage order.

    Attributes:
        element: of the codes.
    """

    element: Element = E4M3

    def parameters(self) -> dict[str, Any]:
        element = self.element
        return {"kind": "float", "bits": element.bits, "variant": element.name, "group": BLOCK, "scale": "e8m0"}

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        out, length = shape[0], row_length(shape)
        return {
            "weight_packed": self.element.spec(out, length),
            "weight_scale": TensorSpec(torch.float8_e8m0fnu, (out, -(-length // BLOCK))),
        }

    def run(self, length: int) -> int:
        return BLOCK

    def grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        scale = power_of_two(torch.maximum(high, -low), self.element).float()
        if torch.isinf(scale * self.element.largest).any():
            raise FormatError("the weight spans more than float32 can express in this format; keep this layer at fp16")
        return Grid(scale)

    def encode(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        return self.element.nearest(rows / grid.scale)

    def decode(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        return codes * grid.scale

    def store(self, codes: torch.Tensor, grid: Grid, shape: Shape) -> dict[str, torch.Tensor]:
        scale = grid.scale.to(torch.float8_e8m0fnu)
        return {"weight_packed": self.element.packed(codes), "weight_scale": scale}

    def load(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, Grid]:
        codes = self.element.unpacked(tensors["weight_packed"], row_length(shape))
        return codes, Grid(tensors["weight_scale"].float())


def power_of_two(top: torch.Tensor, element: Element) -> torch.Tensor:
    """The scales of blocks, e8m0, with `top`, float32, their largest magnitudes; NaN where `top` is not finite."""
    share, exponent = torch.frexp(top / element.largest)  # share 2^exponent, share in [1/2, 1)
    rounded = torch.where(share > 0.5, exponent, exponent - 1)
    biased = torch.where(share == 0, 0, rounded + _BIAS).clamp_(0, 2 * _BIAS)
    biased = torch.where(torch.isfinite(top), biased, 255)
    return biased.to(torch.uint8).view(torch.float8_e8m0fnu)
