"""MXFP8 and NVFP4 activation quantization: their definitions, and the reference in plain torch code.

    MXFP8   x_q = 2^e e4m3(x / 2^e), e as in `mxfp8`, for each block of 32 inputs
    NVFP4   x_q = (g s) e2m1(x / (g s)), s as in `nvfp4` for each block of 16 inputs, g from the whole sample
    y = sum_k x_q W + b,    W as stored;    in float32, sums in any order, rounded once to x's dtype

A block is consecutive along the inputs of a linear layer and along the channels of one pixel of a convolution; the last
one of a row may be short. All scales are taken at run time. A sample is an entry of the first dimension, so a result
does not depend on the rest of the batch; for a batch of one, g is the dynamic scale of the tensor as ComfyUI and
torchao take it. A block, or a sample, with a NaN or an infinite value gives NaN. Products of two codes are exact.

MXFP8 covers weights in `mxfp8` and `mxfp4`, NVFP4 those in `nvfp4`: the pairs that tensor cores multiply (NVIDIA PTX
ISA, `tcgen05.mma` with block scaling). The blocks of a convolution's weight must not reach across taps, so its channels
have to be a multiple of the block. `suits` leaves other formats and shapes in FLOAT.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from bitpolicy.kernels.compute import int8 as int8_compute
from bitpolicy.kernels.compute.int8 import multiply
from bitpolicy.kernels.formats import microscaling, tensor_scaled
from bitpolicy.kernels.formats.elements import E2M1, E4M3
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import MXFP4, MXFP8, NVFP4
from bitpolicy.kernels.kernel import Compute, Geometry, PackedWeight

FORMATS: dict[Compute, tuple[Format, ...]] = {Compute.MXFP8: (MXFP8, MXFP4), Compute.NVFP4: (NVFP4,)}
_BLOCK = {Compute.MXFP8: microscaling.BLOCK, Compute.NVFP4: tensor_scaled.BLOCK}


def suits(weight: PackedWeight, compute: Compute) -> bool:
    """Whether this layer rounds its inputs when `compute` is requested. Depends on its format and shape."""
    even = weight.geometry is None or weight.shape[1] % _BLOCK[compute] == 0
    return weight.format in FORMATS[compute] and even and int8_compute.suits(weight)


def rounded_input(x: torch.Tensor, geometry: Geometry | None, compute: Compute) -> torch.Tensor:
    """x_q, float32.

    Args:
        x: float, shape (..., in) for a linear layer, (B, in, *spatial) for a convolution.
    """
    if not x.numel():
        return x.float()
    last = x if geometry is None else x.movedim(1, -1)
    length, block = last.shape[-1], _BLOCK[compute]
    blocks = pad(last.float(), (0, -length % block)).unflatten(-1, (-1, block))
    rounded = _ROUND[compute](blocks).flatten(-2)[..., :length]
    return torch.empty_like(x, dtype=torch.float32).copy_(rounded if geometry is None else rounded.movedim(-1, 1))


def block_scaled_product(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, compute: Compute
) -> torch.Tensor:
    """y, computed with plain torch code."""
    seen, wide = rounded_input(x, weight.geometry, compute), None if bias is None else bias.float()
    return multiply(seen, weight.dequantize(torch.float32), weight.geometry, wide).to(x.dtype)


def _microscaled(blocks: torch.Tensor) -> torch.Tensor:
    scale = microscaling.power_of_two(_largest(blocks, (-1,)), E4M3).float()
    return E4M3.nearest(blocks / scale).mul_(scale)


def _nvfp4(blocks: torch.Tensor) -> torch.Tensor:
    shared = tensor_scaled.tensor_scale(_largest(blocks, tuple(range(min(1, blocks.ndim - 2), blocks.ndim))))
    scale = tensor_scaled.block_scale(_largest(blocks, (-1,)), shared) * shared
    return E2M1.nearest(blocks / scale).mul_(scale)


_ROUND: dict[Compute, Callable[[torch.Tensor], torch.Tensor]] = {
    Compute.MXFP8: _microscaled,
    Compute.NVFP4: _nvfp4,
}


def _largest(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """max|x| over `dims`, of size 1 along them; NaN if a value is NaN."""
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))
