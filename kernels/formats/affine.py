"""`int2` to `int8` in groups: integer codes, a float16 scale for each group, and a u8 zero point unless symmetric.

    w ~ scale (code - zero),  code in [0, 2^bits - 1]

Asymmetric grids span the group's range. Symmetric grids store no zero point: zero is the code 2^(bits-1). The sign of
the scale puts the weight of largest magnitude on code 0, the side with one more level (as in ggml's Q4_0). Rotated
formats (`-rot`) first multiply each group by a Hadamard matrix; see `bitpolicy.kernels.formats.hadamard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.formats.format import Shape, TensorSpec
from bitpolicy.kernels.formats.grid import Grid, GridFormat, unless_flat
from bitpolicy.kernels.formats.hadamard import hadamard
from bitpolicy.kernels.formats.packing import pack_bits, packed_length, row_length, unpack_bits


@dataclass(frozen=True)
class Affine(GridFormat):
    """One (scale, zero) for each group of weights along the storage order.

    Attributes:
        bits: per code, 2 to 8.
        group: the group size, > 0; None means a whole row, one output channel.
        symmetric: no zero point.
        rotated: groups are rotated; `group` is a power of two that divides K.
    """

    bits: int = 4
    group: int | None = 64
    symmetric: bool = False
    rotated: bool = False

    def parameters(self) -> dict[str, Any]:
        group = self.group or "channel"
        rotation = {"rotation": "hadamard"} if self.rotated else {}
        return {"kind": "affine", "bits": self.bits, "group": group, "symmetric": self.symmetric, **rotation}

    def fits(self, shape: Shape) -> bool:
        return not self.rotated or row_length(shape) % self.run(row_length(shape)) == 0

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        out, length = shape[0], row_length(shape)
        groups = -(-length // self.run(length))
        specs = {
            "weight_packed": TensorSpec(torch.uint8, (out, packed_length(length, self.bits))),
            "weight_scale": TensorSpec(torch.float16, (out, groups)),
        }
        return specs if self.symmetric else {**specs, "weight_zero": TensorSpec(torch.uint8, (out, groups))}

    def run(self, length: int) -> int:
        return self.group or length

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        rows = super().rows(weight)
        return hadamard(rows, self.run(rows.shape[1])) if self.rotated else rows

    def weight(self, rows: torch.Tensor, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return super().weight(hadamard(rows, self.run(rows.shape[1])) if self.rotated else rows, shape, dtype)

    @property
    def rotation(self) -> int:
        return (self.group or 0) if self.rotated else 0

    def rotated_hessian(self, hessian: torch.Tensor) -> torch.Tensor:
        if not self.rotated:
            return hessian
        run = self.run(hessian.shape[-1])
        return hadamard(hadamard(hessian, run).mT, run)

    def grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        if self.symmetric:
            scale = torch.where(high > -low, -high, -low) / self._middle
        else:
            scale = (high - low) / self._top
        stored = scale.half()
        if not torch.isfinite(stored).all():
            raise FormatError("the weight spans more than a float16 scale can express; keep this layer at fp16 or int8")
        wide = unless_flat(stored).float()
        return Grid(wide, None if self.symmetric else (-low / wide).round().clamp(0, self._top))

    def encode(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        return (rows / grid.scale).add_(self._zero(grid)).round_().clamp_(0, self._top)

    def decode(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        return (codes - self._zero(grid)).mul_(grid.scale)

    def store(self, codes: torch.Tensor, grid: Grid, shape: Shape) -> dict[str, torch.Tensor]:
        stored = {"weight_packed": pack_bits(codes.to(torch.uint8), self.bits), "weight_scale": grid.scale.half()}
        return stored if grid.zero is None else {**stored, "weight_zero": grid.zero.to(torch.uint8)}

    def load(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, Grid]:
        codes = unpack_bits(tensors["weight_packed"], self.bits, row_length(shape)).float()
        zero = None if self.symmetric else tensors["weight_zero"].float()
        return codes, Grid(tensors["weight_scale"].float(), zero)

    @property
    def _top(self) -> int:
        return 2**self.bits - 1

    @property
    def _middle(self) -> int:
        return 2 ** (self.bits - 1)

    def _zero(self, grid: Grid) -> torch.Tensor | int:
        return self._middle if grid.zero is None else grid.zero
