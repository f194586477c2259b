"""`fp8` and `nf4`: codes for levels that are not evenly spaced.

`fp8` is float8 e4m3 (Micikevicius et al. 2022, section 3) in the weight's own shape, with one float32 scale for each
output channel that puts its largest weight at 448. `nf4` has 16 levels that hold equal shares of a normal distribution
(Dettmers et al. 2023, "QLoRA", section 3 and appendix E), with a float16 scale for each group of 64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.formats.elements import E4M3
from bitpolicy.kernels.formats.format import Shape, TensorSpec
from bitpolicy.kernels.formats.grid import Grid, GridFormat, unless_flat
from bitpolicy.kernels.formats.packing import from_rows, pack_bits, packed_length, row_length, to_rows, unpack_bits

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Float8(GridFormat):
    """w ~ scale[out] * value, where value is a float8 e4m3."""

    def parameters(self) -> dict[str, Any]:
        return {"kind": "float", "bits": 8, "variant": "e4m3", "group": "channel"}

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {
            "weight_packed": TensorSpec(torch.float8_e4m3fn, tuple(shape)),
            "weight_scale": TensorSpec(torch.float32, (shape[0],)),
        }

    def run(self, length: int) -> int:
        return length

    def grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        return Grid(unless_flat(torch.maximum(high, -low) / E4M3.largest))

    def encode(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        return E4M3.nearest(rows / grid.scale)

    def decode(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        return codes * grid.scale

    def store(self, codes: torch.Tensor, grid: Grid, shape: Shape) -> dict[str, torch.Tensor]:
        return {"weight_packed": E4M3.packed(from_rows(codes, shape)), "weight_scale": grid.scale[:, 0].clone()}

    def load(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, Grid]:
        return to_rows(tensors["weight_packed"].float()), Grid(tensors["weight_scale"][:, None])


@dataclass(frozen=True)
class NormalFloat4(GridFormat):
    """w ~ scale * level[code].

    Attributes:
        group: the group size, > 0.
    """

    group: int = 64

    def parameters(self) -> dict[str, Any]:
        return {"kind": "codebook", "bits": 4, "codebook": "nf4", "group": self.group}

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        out, length = shape[0], row_length(shape)
        return {
            "weight_packed": TensorSpec(torch.uint8, (out, packed_length(length, 4))),
            "weight_scale": TensorSpec(torch.float16, (out, -(-length // self.group))),
        }

    def run(self, length: int) -> int:
        return self.group

    def grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        scale = torch.maximum(high, -low).half()
        if torch.isinf(scale).any():
            raise FormatError("the weight spans more than a float16 scale can express; keep this layer at fp16 or int8")
        return Grid(unless_flat(scale).float())

    def encode(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        levels = _levels(rows.device)
        return torch.bucketize((rows / grid.scale).contiguous(), (levels[1:] + levels[:-1]) / 2).float()

    def decode(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        return _levels(codes.device)[codes.int()] * grid.scale

    def store(self, codes: torch.Tensor, grid: Grid, shape: Shape) -> dict[str, torch.Tensor]:
        return {"weight_packed": pack_bits(codes.to(torch.uint8), 4), "weight_scale": grid.scale.half()}

    def load(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, Grid]:
        return unpack_bits(tensors["weight_packed"], 4, row_length(shape)), Grid(tensors["weight_scale"].float())


def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor(_NF4, device=device)
