"""The CUDA kernels, written in Triton: the calls that each accepts, and what it is composed of.

triton-dequantize    EXACT  a kernel dequantizes the weight to scratch memory, then cuBLAS or cuDNN multiplies
triton-float         FLOAT  the weight is dequantized inside the product
triton-int8          INT8   the input is quantized once, then 8-bit codes are multiplied
triton-fp8           FP8    the same with float8 codes, on GPUs that can multiply them

Triton is imported at the first call, so naming the kernels costs nothing. No kernel waits for the GPU, and scratch
memory comes from torch's allocator, so calls can be captured in a CUDA graph after one run of each shape.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from functools import cache
from importlib.util import find_spec
from math import prod

import torch

from bitpolicy.kernels.compute.int8 import TOP, multiply, weight_codes
from bitpolicy.kernels.formats.affine import Affine
from bitpolicy.kernels.formats.named import FP8, INT8
from bitpolicy.kernels.kernel import Compute, Geometry, Kernel, PackedWeight, Prepared

_LONGEST = (2**31 - 1) // (TOP * 127)  # terms of a sum of codes that is sure to fit 32 bits


def _unavailable(x: torch.Tensor) -> str | None:
    """Why Triton cannot take this input."""
    if x.numel() >= 2**31:
        return "for inputs of less than 2^31 values"
    if x.is_cuda or x.is_meta:  # meta tensors allow compiling without a GPU
        return _missing(x.device)
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return None if interpreted else "for cuda"


@cache
def _missing(device: torch.device) -> str | None:
    """Why Triton does not work on a device. The first call launches a small kernel there to find out."""
    if find_spec("triton") is None:
        return "triton is not installed on this machine"
    if device.type != "cuda":
        return None
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "this machine's GPU is not an NVIDIA GPU of the Ampere generation or later"
    try:
        from bitpolicy.kernels.triton.weights import dequantized

        stored = INT8.quantize(torch.ones(1, 32))
        with torch.cuda.device(device):
            dequantized(INT8, {name: tensor.to(device) for name, tensor in stored.items()}, (1, 32), torch.float16)
    except Exception as error:  # noqa: BLE001 # Triton runs a C compiler and ptxas, and passes on whatever they raise
        return f"triton does not work on this machine: {type(error).__name__}: {error}"
    return None


def _unpackable(weight: PackedWeight) -> bool:
    """Whether the kernels of `triton.weights` support this format."""
    f = weight.format
    return f == INT8 or (isinstance(f, Affine) and f.bits in (4, 8) and not f.rotated)


def _padded_size(x: torch.Tensor, geometry: Geometry) -> int:
    """The number of values in an input, including its padding."""
    return prod(x.shape[:2]) * prod(n + 2 * pad for n, pad in zip(x.shape[2:], geometry.padding, strict=False))


def _left_to_torch(x: torch.Tensor, weight: PackedWeight) -> bool:
    """Whether torch must handle the call: the input is empty, or the shapes do not match and torch should raise."""
    if weight.geometry is None:
        return x.numel() == 0 or x.shape[-1] != weight.shape[1]
    g, fits = weight.geometry, x.ndim == 2 + len(weight.geometry.stride) and x.shape[1] == weight.shape[1]
    spans = zip(x.shape[2:], weight.shape[2:], g.padding, g.dilation, strict=False)
    return x.numel() == 0 or not fits or any(n + 2 * p < d * (k - 1) + 1 for n, k, p, d in spans)


def _no_codes_of(x: torch.Tensor, weight: PackedWeight) -> str | None:
    """Why the kernels that quantize their input cannot do so here."""
    if weight.geometry is not None and weight.geometry.groups > 1:
        return "not for grouped convolutions"
    if weight.geometry is not None and _padded_size(x, weight.geometry) >= 2**31:
        return "for padded inputs of less than 2^31 values"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "for float32, float16 and bfloat16"
    return _unavailable(x)


class _Product(Kernel):
    """A kernel that multiplies packed weights itself. Invalid and empty inputs are left to torch."""

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        if _left_to_torch(x, weight):
            return multiply(x, x.new_zeros(weight.shape), weight.geometry, bias)
        return self._multiply(x, weight, bias, prepared)

    @abstractmethod
    def _multiply(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        """The product, for a non-empty input that matches the weight."""


class TritonDequantize(Kernel):
    """Dequantize with our own kernel, multiply with torch."""

    name = "triton-dequantize"
    compute = Compute.EXACT

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        return _unavailable(x) or (None if _unpackable(weight) else "for int4 and int8 in groups, not rotated")

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        from bitpolicy.kernels.triton.layers import is_channels_last
        from bitpolicy.kernels.triton.weights import dequantized

        last = weight.geometry is not None and weight.geometry.groups == 1 and is_channels_last(x)
        unpacked = dequantized(weight.format, weight.tensors, weight.shape, x.dtype, channels_last=last)
        return multiply(x, unpacked, weight.geometry, bias)


class TritonFloat(_Product):
    """Multiply 16-bit inputs with `int8` and 4-bit weights, dequantized tile by tile."""

    name = "triton-float"
    compute = Compute.FLOAT

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        f = weight.format
        if not (f == INT8 or (isinstance(f, Affine) and f.bits == 4 and not f.rotated)):
            return "for int8 and for 4 bits in groups, not rotated"
        if weight.geometry is not None and weight.geometry.groups > 1:
            return "not for grouped convolutions"
        if x.dtype not in (torch.float16, torch.bfloat16):
            return "for float16 and bfloat16"
        return _unavailable(x)

    def prepare(self, weight: PackedWeight, dtype: torch.dtype) -> Prepared:
        return _prepared_rows(weight)

    def _multiply(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        from bitpolicy.kernels.triton.layers import multiply_floats

        return multiply_floats(x, weight, bias, prepared)


class TritonInt8(_Product):
    """Quantize the input once, multiply codes, and scale the sums.

    4-bit weights keep their storage layout. With few rows they are requantized inside the product, with many rows once
    to scratch memory. Formats that do not allow this are kept as 8-bit codes in addition to the packed tensors.
    """

    name = "triton-int8"
    compute = Compute.INT8

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        if weight.row_length > _LONGEST:
            return f"for rows of at most {_LONGEST} weights, whose sums fit 32 bits"
        if weight.low_memory and not _unpackable(weight):
            return "this format must be kept in 8 bits, which low_memory forbids"
        return _no_codes_of(x, weight)

    def prepare(self, weight: PackedWeight, dtype: torch.dtype) -> Prepared:
        if weight.low_memory:
            return {}
        from bitpolicy.kernels.triton.weights import byte_rows, channel_scales, code_sums

        if weight.format == INT8:
            return {**_prepared_rows(weight), "code_sums": code_sums(byte_rows(weight.tensors["weight_packed"]))}
        if isinstance(weight.format, Affine) and _unpackable(weight):
            scale, sums = channel_scales(weight.format, weight.tensors, weight.shape)
            return {"channel_scale": scale, "code_sums": sums}
        codes, scale = weight_codes(weight)
        rows = byte_rows(codes)
        return {"rows": rows, "channel_scale": scale, "code_sums": code_sums(rows)}

    def _multiply(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        from bitpolicy.kernels.triton.layers import multiply_codes

        return multiply_codes(x, weight, bias, prepared)


class TritonFp8(_Product):
    """Quantize the input to float8 once, multiply its codes with the stored codes of `fp8`, and scale the sums."""

    name = "triton-fp8"
    compute = Compute.FP8

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        if weight.format != FP8:
            return "for fp8"
        if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
            return "this machine's GPU does not multiply float8; NVIDIA GPUs do from Ada (sm_89) on"
        return _no_codes_of(x, weight)

    def prepare(self, weight: PackedWeight, dtype: torch.dtype) -> Prepared:
        return _prepared_rows(weight)

    def _multiply(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        from bitpolicy.kernels.triton.layers import multiply_float8

        return multiply_float8(x, weight, bias, prepared)


def _prepared_rows(weight: PackedWeight) -> Prepared:
    """Rows in storage order for an `int8` or `fp8` convolution, unless its codes have that order already."""
    if weight.format not in (INT8, FP8) or weight.low_memory:
        return {}
    from bitpolicy.kernels.triton.weights import byte_rows

    stored = weight.tensors["weight_packed"]
    rows = byte_rows(stored)
    return {} if rows.data_ptr() == stored.data_ptr() else {"rows": rows}
