"""`int4`: asymmetric 4-bit codes in groups along the wire order, with a float16 scale and a u8 zero point a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitpolicy.kernels import rtn
from bitpolicy.kernels.format import Format, Shape, TensorSpec
from bitpolicy.kernels.packing import from_rows, pack_nibbles, row_length, to_rows, unpack_nibbles


@dataclass(frozen=True)
class Int4(Format):
    """w ~ scale (code - zero), one (scale, zero) for each run of `group` weights; the last run of a row may be short.

    Attributes:
        group: weights that share a scale, > 0.
    """

    group: int = 64

    def parameters(self) -> dict[str, Any]:
        return {"kind": "affine", "bits": 4, "group": self.group, "symmetric": False}

    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        out, length = shape[0], row_length(shape)
        groups = -(-length // self.group)
        return {
            "weight_packed": TensorSpec(torch.uint8, (out, -(-length // 2))),
            "weight_scale": TensorSpec(torch.float16, (out, groups)),
            "weight_zero": TensorSpec(torch.uint8, (out, groups)),
        }

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = to_rows(weight)
        length = rows.shape[1]
        short = -length % self.group
        if short:  # repeat the row's last value: it changes neither extreme of the last group
            rows = torch.cat([rows, rows[:, -1:].expand(-1, short)], dim=1)
        codes, scale, zero = rtn.asymmetric(rows.unflatten(1, (-1, self.group)), 4, torch.float16)
        return {"weight_packed": pack_nibbles(codes.flatten(1)[:, :length]), "weight_scale": scale, "weight_zero": zero}

    def dequantize(self, tensors: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        length = row_length(shape)
        codes = unpack_nibbles(tensors["weight_packed"], length)
        scale = tensors["weight_scale"].float().repeat_interleave(self.group, dim=1)[:, :length]
        zero = tensors["weight_zero"].float().repeat_interleave(self.group, dim=1)[:, :length]
        return from_rows(((codes.float() - zero) * scale).to(dtype), shape)
