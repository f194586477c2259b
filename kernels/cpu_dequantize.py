"""Dequantization on the CPU by `csrc/dequantize.cpp`: the bits of `format.dequantize`, several times faster."""

from __future__ import annotations

from functools import lru_cache

import torch

from bitpolicy.kernels import cpu_extension
from bitpolicy.kernels.affine import Affine
from bitpolicy.kernels.float_codes import _NF4, Float8, NormalFloat4
from bitpolicy.kernels.int8 import Int8
from bitpolicy.kernels.kernel import PackedWeight
from bitpolicy.kernels.packing import row_length

_LONGEST_ROTATION = 128


def refuses(weight: PackedWeight, dtype: torch.dtype) -> str | None:
    """Why `dequantize` cannot make this weight; None if it can."""
    if reason := cpu_extension.why_unavailable():
        return reason
    if cpu_extension.dtype_code(dtype) is None:
        return f"not for {dtype}"
    if not isinstance(weight.format, Affine | Int8 | Float8 | NormalFloat4):
        return f"not for {weight.format.name}"
    if isinstance(weight.format, Affine) and weight.format.rotated and (weight.format.group or 0) > _LONGEST_ROTATION:
        return f"rotates runs of at most {_LONGEST_ROTATION}"
    if any(tensor.device.type != "cpu" for tensor in weight.tensors.values()):
        return "the weight is not on the CPU"
    if not all(tensor.is_contiguous() for tensor in weight.tensors.values()):
        return "a stored tensor is not contiguous"
    return None


def dequantize(weight: PackedWeight, to: torch.Tensor) -> torch.Tensor:
    """Fill `to`, contiguous, shape `weight.shape`, with the weight; `refuses` has agreed."""
    if not to.numel():
        return to
    if isinstance(weight.format, Int8 | Float8):
        _from_bytes(weight, to)
    else:
        _from_groups(weight, to)
    return to


def _from_bytes(weight: PackedWeight, to: torch.Tensor) -> None:
    codes, scale = weight.tensors["weight_packed"], weight.tensors["weight_scale"]
    values = _float8_values().data_ptr() if isinstance(weight.format, Float8) else None
    cpu_extension.library().bitpolicy_dequantize_bytes(  # type: ignore[union-attr]
        codes.data_ptr(),
        scale.data_ptr(),
        values,
        weight.shape[0],
        row_length(weight.shape),
        to.data_ptr(),
        cpu_extension.dtype_code(to.dtype),
        torch.get_num_threads(),
    )


def _from_groups(weight: PackedWeight, to: torch.Tensor) -> None:
    format, tensors, length = weight.format, weight.tensors, row_length(weight.shape)
    assert isinstance(format, Affine | NormalFloat4)
    affine = isinstance(format, Affine)
    run = format.run(length)
    zero = tensors.get("weight_zero")
    cpu_extension.library().bitpolicy_dequantize_groups(  # type: ignore[union-attr]
        tensors["weight_packed"].data_ptr(),
        tensors["weight_scale"].data_ptr(),
        None if zero is None else zero.data_ptr(),
        None if affine else nf4_values().data_ptr(),
        format.bits if isinstance(format, Affine) else 4,
        weight.shape[0],
        weight.shape[1],
        length // weight.shape[1],
        run,
        isinstance(format, Affine) and format.rotated,
        run**-0.5,
        to.data_ptr(),
        cpu_extension.dtype_code(to.dtype),
        torch.get_num_threads(),
    )


@lru_cache(maxsize=1)
def _float8_values() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@lru_cache(maxsize=1)
def nf4_values() -> torch.Tensor:
    return torch.tensor(_NF4)
