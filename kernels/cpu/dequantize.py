"""Dequantization on the CPU by `csrc/dequantize.cpp`: the bits of `format.dequantize`, several times faster."""

from __future__ import annotations

from ctypes import Array, c_int64
from functools import lru_cache
from struct import pack, unpack

import torch

from bitpolicy.kernels.cpu import extension as cpu_extension
from bitpolicy.kernels.formats.affine import Affine
from bitpolicy.kernels.formats.float_codes import _NF4, Float8, NormalFloat4
from bitpolicy.kernels.formats.int8 import Int8
from bitpolicy.kernels.kernel import PackedWeight

_LONGEST_ROTATION = 128
_IN_BYTES = (Int8, Float8)  # one byte per code and no groups


def refuses(weight: PackedWeight, dtype: torch.dtype) -> str | None:
    """Why `dequantize` cannot handle this weight; None if it can."""
    if reason := cpu_extension.why_unavailable():
        return reason
    if cpu_extension.dtype_code(dtype) is None:
        return f"not for {dtype}"
    if not isinstance(weight.format, Affine | Int8 | Float8 | NormalFloat4):
        return f"not for {weight.format.name}"
    if isinstance(weight.format, Affine) and weight.format.rotated and (weight.format.group or 0) > _LONGEST_ROTATION:
        return f"for rotations of at most {_LONGEST_ROTATION} weights"
    if any(tensor.device.type != "cpu" for tensor in weight.tensors.values()):
        return "the weight is not on the CPU"
    if not all(tensor.is_contiguous() for tensor in weight.tensors.values()):
        return "a stored tensor is not contiguous"
    return None


def dequantize(weight: PackedWeight, to: torch.Tensor) -> torch.Tensor:
    """Fill `to`, contiguous, shape `weight.shape`, with the weight. Requires that `refuses` returns None."""
    if not to.numel():
        return to
    if isinstance(weight.format, _IN_BYTES):
        _from_bytes(weight, to)
    else:
        _from_groups(weight, to)
    return to


def unpacked(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight, shape `weight.shape`, contiguous: by C++ if it takes this weight, else by plain torch code."""
    if refuses(weight, dtype):
        return weight.dequantize(dtype)
    return dequantize(weight, torch.empty(weight.shape, dtype=dtype))


def _from_bytes(weight: PackedWeight, to: torch.Tensor) -> None:
    codes, scale = weight.tensors["weight_packed"], weight.tensors["weight_scale"]
    values = _float8_values().data_ptr() if isinstance(weight.format, Float8) else None
    out = weight.shape[0]
    cpu_extension.library().bitpolicy_dequantize_bytes(  # type: ignore[union-attr]
        codes.data_ptr(),
        scale.data_ptr(),
        values,
        out,
        codes.numel() // out,
        to.data_ptr(),
        cpu_extension.dtype_code(to.dtype),
        torch.get_num_threads(),
    )


def _from_groups(weight: PackedWeight, to: torch.Tensor) -> None:
    tensors, zero = weight.tensors, weight.tensors.get("weight_zero")
    cpu_extension.library().bitpolicy_dequantize_groups(  # type: ignore[union-attr]
        _plans.get((weight.kind, to.dtype)) or _plan(weight, to.dtype),
        tensors["weight_packed"].data_ptr(),
        tensors["weight_scale"].data_ptr(),
        None if zero is None else zero.data_ptr(),
        None if isinstance(weight.format, Affine) else nf4_values().data_ptr(),
        to.data_ptr(),
        torch.get_num_threads(),
    )


_plans: dict[tuple[int, torch.dtype], Array[c_int64]] = {}


def _plan(weight: PackedWeight, dtype: torch.dtype) -> Array[c_int64]:
    """The arguments of csrc/dequantize.cpp that are not pointers, computed once per kind of weight."""
    format, length = weight.format, weight.row_length
    assert isinstance(format, Affine | NormalFloat4)
    bits, rotated = (format.bits, format.rotated) if isinstance(format, Affine) else (4, False)
    (norm,) = unpack("i", pack("f", format.run(length) ** -0.5))
    out, channels = weight.shape[:2]
    numbers = (bits, out, channels, length // channels, format.run(length), rotated, norm)
    plan = _plans[weight.kind, dtype] = (c_int64 * 8)(*numbers, cpu_extension.dtype_code(dtype) or 0)
    return plan


@lru_cache(maxsize=1)
def _float8_values() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@lru_cache(maxsize=1)
def nf4_values() -> torch.Tensor:
    return torch.tensor(_NF4)
