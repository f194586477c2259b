"""Layers on top of the Triton product: the shapes and memory formats of inputs and outputs, and the choice of tiles.

A convolution reads its input channels last. If the input has that order, it is read in place. Floats in any other order
are copied once; 8-bit codes are written channels last from the start, with their padding. The kernel stores with
strides, so the output has the memory format of torch's own layer.
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch
import triton
from torch._prims_common import suggest_memory_format

from bitpolicy.kernels.compute.fp8 import CODE
from bitpolicy.kernels.compute.int8 import shared
from bitpolicy.kernels.formats.affine import Affine
from bitpolicy.kernels.formats.named import INT8
from bitpolicy.kernels.kernel import PackedWeight, Prepared
from bitpolicy.kernels.triton.configs import Config, Product, choose
from bitpolicy.kernels.triton.input import quantized
from bitpolicy.kernels.triton.product import ONE_PIXEL, Rows, Window, launch, window
from bitpolicy.kernels.triton.weights import byte_rows, channel_scales, code_sums, requantized

UNPACK_FROM = 128
"""From this many rows of input, a 4-bit weight is requantized once to scratch memory, not once per tile of rows."""

Grid = tuple[torch.Tensor, torch.Tensor | None]  # s_x and, for integers, z - 128


def multiply_floats(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
) -> torch.Tensor:
    """The product of 16-bit inputs, which are not empty."""
    codes = _channels_last(x).contiguous() if weight.geometry is not None else x.contiguous()
    return _product(x, codes, None, _float_rows(weight, prepared), weight, bias)


def multiply_codes(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
) -> torch.Tensor:
    """The product of inputs that are first quantized to 8 bits, and are not empty."""
    padding = () if weight.geometry is None else weight.geometry.padding
    codes, scale, zero = quantized(x, shared(x.ndim, weight.shape, weight.geometry), padding)
    return _product(x, codes, (scale, zero), _integer_rows(weight, prepared, codes), weight, bias)


def multiply_float8(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
) -> torch.Tensor:
    """The product of non-empty inputs that are first quantized to float8, with a weight in `fp8`."""
    padding = () if weight.geometry is None else weight.geometry.padding
    codes, scale, _ = quantized(x, shared(x.ndim, weight.shape, weight.geometry), padding, CODE)
    rows = Rows(_stored_codes(weight, prepared), channel_scale=weight.tensors["weight_scale"])
    return _product(x, codes, (scale, None), rows, weight, bias)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether torch's own convolution would give a channels-last result for this input."""
    return x.ndim > 3 and suggest_memory_format(x) != torch.contiguous_format


def _product(
    x: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid | None,
    rows: Rows,
    weight: PackedWeight,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply `codes`, the values of `x` in the kernel's order, padded if they have 8 bits."""
    out = weight.shape[0]
    if weight.geometry is None:
        place, y = ONE_PIXEL, x.new_empty((*x.shape[:-1], out))
        into = y.view(-1, 1, out)
    else:
        place = window(tuple(x.shape[2:]), weight.shape[2:], weight.geometry)
        y, into = _output(x, out, place)
        place = place if grid is None else place.padded
    launch(codes, grid, rows, bias, into, place, _config(codes, grid, rows, bias, into, place, weight))
    return y


def _output(x: torch.Tensor, out: int, place: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """The output tensor of a convolution, shape (B, out, *spatial), and a view of it, shape (B, pixels, out)."""
    samples, spatial = x.shape[0], place.output[5 - x.ndim :]
    pixels = prod(spatial)
    if is_channels_last(x):
        y = x.new_empty((samples, *spatial, out))
        return y.movedim(-1, 1), y.view(samples, pixels, out)
    y = x.new_empty((samples, out, *spatial))
    return y, y.view(samples, out, pixels).transpose(1, 2)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """(B, C, *spatial) -> (B, *spatial, C)."""
    return x.movedim(1, -1)


def _float_rows(weight: PackedWeight, prepared: Prepared) -> Rows:
    """The weight for 16-bit inputs. A scale shared by a whole row is applied to the finished sum."""
    tensors = weight.tensors
    if weight.format == INT8:
        return Rows(_stored_codes(weight, prepared), channel_scale=tensors["weight_scale"])
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero")
    assert isinstance(weight.format, Affine)
    if scale.shape[1] == 1:
        return Rows(tensors["weight_packed"], scale, zero, 0, channel_scale=scale)
    return Rows(tensors["weight_packed"], scale, zero, weight.format.run(weight.row_length))


def _integer_rows(weight: PackedWeight, prepared: Prepared, codes: torch.Tensor) -> Rows:
    """The weight for 8-bit inputs."""
    tensors, format = weight.tensors, weight.format
    if format == INT8:
        rows, sums = _stored_codes(weight, prepared), prepared.get("code_sums")
        return Rows(rows, channel_scale=tensors["weight_scale"], code_sums=code_sums(rows) if sums is None else sums)
    if "rows" in prepared:
        return Rows(prepared["rows"], channel_scale=prepared["channel_scale"], code_sums=prepared["code_sums"])
    assert isinstance(format, Affine)
    if prepared:
        scales, sums = prepared["channel_scale"], prepared["code_sums"]
    else:
        scales, sums = channel_scales(format, tensors, weight.shape)
    if format.bits == 8 or codes.numel() // codes.shape[-1] >= UNPACK_FROM:
        return Rows(requantized(format, tensors, weight.shape, scales), channel_scale=scales, code_sums=sums)
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero")
    run = 0 if scale.shape[1] == 1 else format.run(weight.row_length)
    return Rows(tensors["weight_packed"], scale, zero, run, channel_scale=scales, code_sums=sums)


def _stored_codes(weight: PackedWeight, prepared: Prepared) -> torch.Tensor:
    """The rows of a format with one byte per code."""
    rows = prepared.get("rows")
    return byte_rows(weight.tensors["weight_packed"]) if rows is None else rows


def _config(
    codes: torch.Tensor,
    grid: Grid | None,
    rows: Rows,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    place: Window,
    weight: PackedWeight,
) -> Config:
    """The tile configuration of this product; timed only if that is requested and possible."""
    samples, pixels, out = y.shape
    product = Product(
        rows=samples * pixels,
        out=out,
        length=weight.row_length,
        channels=weight.shape[1],
        bits=rows.bits,
        integer=codes.dtype == torch.int8,
        float8=codes.dtype == CODE,
        run=rows.run,
        warpgroups=_has_warpgroups(codes.device),
    )
    if not codes.is_cuda or torch.cuda.is_current_stream_capturing():
        return choose(product, None, None)

    def time(config: Config) -> float:
        return triton.testing.do_bench(lambda: launch(codes, grid, rows, bias, y, place, config), warmup=5, rep=20)

    return choose(product, (codes.device, codes.dtype, place), time)


@cache
def _has_warpgroups(device: torch.device) -> bool:
    if device.type == "cpu":
        return True  # interpreted
    return triton.runtime.driver.active.get_current_target().arch // 10 in (9, 10)
