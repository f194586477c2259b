"""`int8`: symmetric 8-bit codes in the weight's own shape, with one float32 scale for each output channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitpolicy.kernels.formats.format import Shape, TensorSpec
from bitpolicy.kernels.formats.grid import Grid, GridFormat, unless_flat
from bitpolicy.kernels.formats.packing import from_rows, to_rows

_TOP = 127  # -128 has no counterpart and is not used


@dataclass(frozen=True)
class Int8(GridFormat):
    """w ~ scale[out] * code, code in [-127, 127]."""

    def parameters(self) -> dict[str, Any]:
        return {"kind": "affine", "bits": 8, "group": "channel", "symmetric": True}

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {
            "weight_packed": TensorSpec(torch.int8, tuple(shape)),
            "weight_scale": TensorSpec(torch.float32, (shape[0],)),
        }

    def run(self, length: int) -> int:
        return length

    def grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        return Grid(unless_flat(torch.maximum(high, -low) / _TOP))

    def encode(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        return (rows / grid.scale).round_().clamp_(-_TOP, _TOP)

    def decode(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        return codes * grid.scale

    def store(self, codes: torch.Tensor, grid: Grid, shape: Shape) -> dict[str, torch.Tensor]:
        return {"weight_packed": from_rows(codes.to(torch.int8), shape), "weight_scale": grid.scale[:, 0].clone()}

    def load(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, Grid]:
        return to_rows(tensors["weight_packed"]).float(), Grid(tensors["weight_scale"][:, None])

    def dequantize(self, tensors: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        scale = tensors["weight_scale"].view(-1, *[1] * (len(shape) - 1))  # the codes already have the weight's shape
        return (tensors["weight_packed"].float() * scale).to(dtype).contiguous()
