"""`int8`: symmetric 8-bit codes in the weight's own shape, with one float32 scale for each output channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitpolicy.kernels import rtn
from bitpolicy.kernels.format import Format, Shape, TensorSpec


@dataclass(frozen=True)
class Int8(Format):
    """w ~ scale[out] * code, code in [-127, 127]."""

    def parameters(self) -> dict[str, Any]:
        return {"kind": "affine", "bits": 8, "group": "channel", "symmetric": True}

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {
            "weight_packed": TensorSpec(torch.int8, tuple(shape)),
            "weight_scale": TensorSpec(torch.float32, (shape[0],)),
        }

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scale = rtn.symmetric(weight.flatten(1), 8)
        return {"weight_packed": codes.view(weight.shape), "weight_scale": scale}

    def dequantize(self, tensors: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        scale = tensors["weight_scale"].view(-1, *[1] * (len(shape) - 1))
        return (tensors["weight_packed"].float() * scale).to(dtype).contiguous()
