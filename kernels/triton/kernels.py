"""The kernels for CUDA, written in Triton: what each takes, and which pieces it is made of.

triton-dequantize    EXACT  a kernel dequantizes the weight to scratch memory, then cuBLAS or cuDNN multiplies
triton-float         FLOAT  the weight is dequantized inside the product
triton-int8          INT8   the input is quantized once, then 8-bit codes are multiplied
triton-fp8           FP8    the same with codes that are float8, on GPUs that multiply them

Triton is imported when the first of them is called, so naming them costs nothing. Nothing here waits for the GPU, and
scratch memory comes from torch's allocator, so that calls can be captured in a CUDA graph; each shape has to run once
before.
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

_LONGEST = (2**31 - 1) // (TOP * 127)  # products of codes that surely fit a sum in 32 bits


def _unavailable(x: torch.Tensor) -> str | None:
    """Why Triton cannot take this input at all."""
    if x.numel() >= 2**31:
        return "for inputs of less than 2^31 values"
    if x.is_cuda or x.is_meta:  # meta tensors are for compiling without a GPU
        return _missing(x.device)
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return None if interpreted else "for cuda"


@cache
def _missing(device: torch.device) -> str | None:
    """Why nothing written in Triton runs on a device; the first time, a small kernel is launched there to see."""
    if find_spec("triton") is None:
        return "triton is not installed on this machine"
    if device.type != "cuda":
        return None
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "this machine's GPU is none of NVIDIA's from Ampere on"
    try:
        from bitpolicy.kernels.triton.weights import dequantized

        stored = INT8.quantize(torch.ones(1, 32))
        with torch.cuda.device(device):
            dequantized(INT8, {name: tensor.to(device) for name, tensor in stored.items()}, (1, 32), torch.float16)
    except Exception as error:  # noqa: BLE001 # Triton runs a C compiler and ptxas, and raises whatever goes wrong there
        return f"triton does not work on this machine: {type(error).__name__}: {error}"
    return None


def _unpackable(weight: PackedWeight) -> bool:
    """Whether the kernels of `triton_weights` read this format."""
    f = weight.format
    return f == INT8 or (isinstance(f, Affine) and f.bits in (4, 8) and not f.rotated)


def _padded_size(x: torch.Tensor, geometry: Geometry) -> int:
    """Values of an input with its padding around it."""
    return prod(x.shape[:2]) * prod(n + 2 * pad for n, pad in zip(x.shape[2:], geometry.padding, strict=False))


def _left_to_torch(x: torch.Tensor, weight: PackedWeight) -> bool:
    """Whether torch has to answer: inputs of no size, or shapes that do not fit together, of which it complains."""
    if weight.geometry is None:
        return x.numel() == 0 or x.shape[-1] != weight.shape[1]
    g, fits = weight.geometry, x.ndim == 2 + len(weight.geometry.stride) and x.shape[1] == weight.shape[1]
    spans = zip(x.shape[2:], weight.shape[2:], g.padding, g.dilation, strict=False)
    return x.numel() == 0 or not fits or any(n + 2 * p < d * (k - 1) + 1 for n, k, p, d in spans)


def _no_codes_of(x: torch.Tensor, weight: PackedWeight) -> str | None:
    """Why the kernels that quantize their input cannot do it here."""
    if weight.geometry is not None and weight.geometry.groups > 1:
        return "for convolutions of one group"
    if weight.geometry is not None and _padded_size(x, weight.geometry) >= 2**31:
        return "for padded inputs of less than 2^31 values"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "for float32, float16 and bfloat16"
    return _unavailable(x)


class _Product(Kernel):
    """A kernel that multiplies packed weights itself, and leaves to torch what is none of its calls."""

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
        """The product of an input of some size that fits the weight."""


class TritonDequantize(Kernel):
    """Dequantize by a kernel of ours, multiply by torch."""

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
    """Multiply 16-bit inputs with weights of `int8` and of 4 bits, dequantized tile by tile."""

    name = "triton-float"
    compute = Compute.FLOAT

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        f = weight.format
        if not (f == INT8 or (isinstance(f, Affine) and f.bits == 4 and not f.rotated)):
            return "for int8 and for 4 bits in groups, not rotated"
        if weight.geometry is not None and weight.geometry.groups > 1:
            return "for convolutions of one group"
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

    4-bit weights stay as they are: few rows requantize them inside the product, many rows once to scratch memory.
    Formats that cannot be requantized so are kept as 8-bit codes beside the packed tensors.
    """

    name = "triton-int8"
    compute = Compute.INT8

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        if weight.row_length > _LONGEST:
            return "a sum of so many products does not fit 32 bits"
        if weight.low_memory and not _unpackable(weight):
            return "this format has to be kept in 8 bits, which low_memory forbids"
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
    """Quantize the input to float8 once, multiply its codes with those of `fp8` as they are stored, scale the sums."""

    name = "triton-fp8"
    compute = Compute.FP8

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        if weight.format != FP8:
            return "for fp8"
        if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
            return "this machine's GPU does not multiply float8, as NVIDIA's do from Ada (sm_89) on"
        return _no_codes_of(x, weight)

    def prepare(self, weight: PackedWeight, dtype: torch.dtype) -> Prepared:
        return _prepared_rows(weight)

    def _multiply(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        from bitpolicy.kernels.triton.layers import multiply_float8

        return multiply_float8(x, weight, bias, prepared)


def _prepared_rows(weight: PackedWeight) -> Prepared:
    """Rows in wire order of an `int8` or `fp8` convolution, if its codes do not lie so already."""
    if weight.format not in (INT8, FP8) or weight.low_memory:
        return {}
    from bitpolicy.kernels.triton.weights import byte_rows

    stored = weight.tensors["weight_packed"]
    rows = byte_rows(stored)
    return {} if rows.data_ptr() == stored.data_ptr() else {"rows": rows}
