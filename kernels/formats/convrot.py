"""`int8-convrot` and `int4-convrot`: ComfyUI's rotated formats, for linear layers.

    W H ~ scale[out] * code,    code in [-127, 127] or [-7, 7]

Blocks of `size` weights along the inputs are multiplied by the *regular* Hadamard matrix H = K (x) K (x) ... / sqrt(n),
where

    K = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]

has the same sum in every row. One float32 scale is shared by each output channel. H is symmetric and orthogonal, and so
its own inverse. ComfyUI calls the formats `int8_tensorwise` with `convrot` and `convrot_w4a4` (comfy-kitchen,
tensor/int8.py and tensor/convrot_w4a4.py). bitpolicy's own formats rotate by another matrix:
`bitpolicy.kernels.formats.hadamard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitpolicy.kernels.formats.format import Shape, TensorSpec
from bitpolicy.kernels.formats.grid import Grid, GridFormat, unless_flat
from bitpolicy.kernels.formats.packing import pack_bits, packed_length, row_length, unpack_bits


@dataclass(frozen=True)
class ConvRot(GridFormat):
    """One scale for each row, which is rotated first.

    Attributes:
        bits: per code, 4 or 8.
        size: the number of weights rotated together, a power of four.
    """

    bits: int = 8
    size: int = 256

    def parameters(self) -> dict[str, Any]:
        scaled = {"kind": "affine", "bits": self.bits, "group": "channel", "symmetric": True}
        return {**scaled, "rotation": f"convrot-{self.size}"}

    def fits(self, shape: Shape) -> bool:
        return len(shape) == 2 and shape[1] % self.size == 0

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        packed = TensorSpec(torch.uint8, (shape[0], packed_length(row_length(shape), self.bits)))
        return {"weight_packed": packed, "weight_scale": TensorSpec(torch.float32, (shape[0],))}

    def run(self, length: int) -> int:
        return length

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        return regular_hadamard(super().rows(weight), self.size)

    def weight(self, rows: torch.Tensor, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return super().weight(regular_hadamard(rows, self.size), shape, dtype)

    @property
    def rotation(self) -> int:
        return -self.size  # negative, so that it never equals a rotation of `Affine`

    def rotated_hessian(self, hessian: torch.Tensor) -> torch.Tensor:
        return regular_hadamard(regular_hadamard(hessian, self.size).mT, self.size)

    def grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        return Grid(unless_flat(torch.maximum(high, -low) / self._top))

    def encode(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        return (rows / grid.scale).round_().clamp_(-self._top, self._top)

    def decode(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        return codes * grid.scale

    def store(self, codes: torch.Tensor, grid: Grid, shape: Shape) -> dict[str, torch.Tensor]:
        raised = (codes + self._middle).to(torch.uint8)
        return {"weight_packed": pack_bits(raised, self.bits), "weight_scale": grid.scale[:, 0].clone()}

    def load(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, Grid]:
        return self.codes(tensors, shape).float(), Grid(tensors["weight_scale"][:, None])

    def codes(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """The signed codes, int8, shape (out, in)."""
        raised = unpack_bits(tensors["weight_packed"], self.bits, row_length(shape))
        return (raised.to(torch.int16) - self._middle).to(torch.int8)

    @property
    def _top(self) -> int:
        return self._middle - 1

    @property
    def _middle(self) -> int:
        return 2 ** (self.bits - 1)


def regular_hadamard(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Multiply each block of `size` values by the regular Hadamard matrix, scaled to be orthogonal.

    Sums run in a fixed order, so every device gives the same bits.

    Args:
        rows: float32, shape (..., K).
        size: a power of four that divides K.
    """
    runs = rows.unflatten(-1, (-1, size))
    quarter = 1
    while quarter < size:
        a, b, c, d = runs.unflatten(-1, (-1, 4, quarter)).unbind(-2)
        turned = (a + b + c - d, a + b - c + d, a - b + c + d, b + c + d - a)
        runs = torch.stack(turned, dim=-2).flatten(-3)
        quarter *= 4
    return runs.flatten(-2) * size**-0.5
