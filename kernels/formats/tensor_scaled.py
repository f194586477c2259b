"""`fp8-tensor` and `nvfp4`: formats with one scale for the whole tensor.

    fp8-tensor   w ~ g code,        code an e4m3 number,    g = max|w| / 448
    nvfp4        w ~ (g s) code,    code an e2m1 number,    g = max|w| / (6 448),
                                    s = e4m3(max|w of the block| / 6 / g) in [2^-9, 448]

`fp8-tensor` is ComfyUI's scaled FP8. `nvfp4` has blocks of 16 along the storage order and two levels of scales (NVIDIA
2025, "Pretraining Large Language Models with NVFP4", section 2 and the appendix on its quantization). Scales are
computed in the order of ComfyUI and torchao. A block of zeros has s = 1, a weight of zeros g = 1, and very small blocks
have s = 2^-9, the smallest positive e4m3 number, as in NVIDIA's modelopt. ComfyUI stores 0 for all of these.

All blocks share g, so it is taken from the whole weight (`settled`) before any rows are rounded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bitpolicy.kernels.formats.elements import E2M1, E4M3
from bitpolicy.kernels.formats.format import Shape, TensorSpec
from bitpolicy.kernels.formats.grid import Grid, GridFormat, unless_flat
from bitpolicy.kernels.formats.packing import from_rows, row_length, to_rows

BLOCK = 16
_LEAST = 2.0**-9  # the smallest positive e4m3 number
_NORMAL = 2.0**-117  # below this, g times the smallest s has no full float32 mantissa


@dataclass(frozen=True)
class TensorScaled(GridFormat):
    """A format with one scale for the whole tensor.

    Attributes:
        shared: g of the weight in hand, a float32 value; None before `settled`.
    """

    shared: float | None = None

    def settled(self, weight: torch.Tensor) -> GridFormat:
        if self.shared is not None:
            return self
        low, high = torch.aminmax(weight.detach())
        return replace(self, shared=float(self.scale_of(torch.maximum(high, -low).float())))

    @abstractmethod
    def scale_of(self, top: torch.Tensor) -> torch.Tensor:
        """g for the largest magnitude of a weight, float32, shape ()."""

    def of_all(self, like: torch.Tensor) -> torch.Tensor:
        """g, float32, shape (), on the device of `like`."""
        if self.shared is None:
            raise ValueError(f"{self.name} has no scale yet: call settled(weight) first")
        return torch.tensor(self.shared, device=like.device)

    def decode(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        return codes * grid.scale


@dataclass(frozen=True)
class TensorFloat8(TensorScaled):
    """w ~ g * value, where value is a float8 e4m3. The scale follows from the rule alone: no range is searched."""

    def parameters(self) -> dict[str, Any]:
        return {"kind": "float", "bits": 8, "variant": "e4m3", "group": "tensor"}

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        codes = TensorSpec(torch.float8_e4m3fn, tuple(shape))
        return {"weight_packed": codes, "weight_scale": TensorSpec(torch.float32, ())}

    def run(self, length: int) -> int:
        return length

    def scale_of(self, top: torch.Tensor) -> torch.Tensor:
        return unless_flat(top / E4M3.largest)

    def grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        return Grid(self.of_all(high).expand(high.shape).contiguous())

    def encode(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        return E4M3.nearest(rows / grid.scale)

    def store(self, codes: torch.Tensor, grid: Grid, shape: Shape) -> dict[str, torch.Tensor]:
        return {"weight_packed": E4M3.packed(from_rows(codes, shape)), "weight_scale": self.of_all(codes)}

    def load(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, Grid]:
        return to_rows(tensors["weight_packed"].float()), Grid(tensors["weight_scale"].expand(shape[0], 1))


@dataclass(frozen=True)
class NvFloat4(TensorScaled):
    """w ~ (g s) * value, where value is a float4 e2m1 and s a float8 e4m3 for each block."""

    def parameters(self) -> dict[str, Any]:
        scales = {"scale": "e4m3", "tensor_scale": "float32"}
        return {"kind": "float", "bits": 4, "variant": "e2m1", "group": BLOCK, **scales}

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        out, length = shape[0], row_length(shape)
        return {
            "weight_packed": E2M1.spec(out, length),
            "weight_scale": E4M3.spec(out, -(-length // BLOCK)),
            "weight_scale_2": TensorSpec(torch.float32, ()),
        }

    def run(self, length: int) -> int:
        return BLOCK

    def scale_of(self, top: torch.Tensor) -> torch.Tensor:
        return tensor_scale(top)

    def grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        shared = self.of_all(high)
        return Grid(block_scale(torch.maximum(high, -low), shared) * shared)

    def encode(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        return E2M1.nearest(rows / grid.scale)

    def store(self, codes: torch.Tensor, grid: Grid, shape: Shape) -> dict[str, torch.Tensor]:
        shared = self.of_all(codes)
        blocks = E4M3.packed(grid.scale / shared)  # the exact s again: the division is off by 2^-23, e4m3 by 2^-4
        return {"weight_packed": E2M1.packed(codes), "weight_scale": blocks, "weight_scale_2": shared}

    def load(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, Grid]:
        codes = E2M1.unpacked(tensors["weight_packed"], row_length(shape))
        return codes, Grid(tensors["weight_scale"].float() * tensors["weight_scale_2"])


def tensor_scale(top: torch.Tensor) -> torch.Tensor:
    """g of `nvfp4` for the largest magnitude of a tensor, float32, shape ()."""
    scale = (top / (E2M1.largest * E4M3.largest)).clamp(min=_NORMAL)
    return torch.where(top == 0, torch.ones_like(scale), scale)


def block_scale(top: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """s of `nvfp4` for the largest magnitudes of blocks, as float32."""
    scale = unless_flat(top / E2M1.largest / shared)  # in this order, which decides ties
    return E4M3.nearest(scale.clamp_(min=_LEAST))
