"""`fp16`: the weight as it is, in the checkpoint's storage dtype (float16 or bfloat16)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitpolicy.kernels.formats.format import Format, Shape, TensorSpec


@dataclass(frozen=True)
class Plain(Format):
    """Two bytes per value. The layer stays an ordinary `nn.Linear` or `nn.Conv`."""

    packed = False

    def parameters(self) -> dict[str, Any]:
        return {"kind": "float", "bits": 16}

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(storage_dtype, tuple(shape))}

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": weight}

    def dequantize(self, tensors: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return tensors["weight"].to(dtype).contiguous()
