"""INT8 and FP8 compute on ordinary layers: they multiply the values that packed layers would, in floats.

    y = Q(x) W_q^T + b,    Q(x) = s_x (x_q - z),    W_q = s_w w_q

with the codes and scales of `bitpolicy.kernels.compute.int8`, or of `fp8_compute`, where z = 0. Results equal those of
a kernel of that compute mode up to the rounding of float sums. Where that moves a later input across a tie, one of its
codes differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bitpolicy.kernels.compute import fp8 as fp8_compute
from bitpolicy.kernels.compute import int8 as int8_compute
from bitpolicy.kernels.compute.int8 import shared
from bitpolicy.kernels.cpu.dequantize import unpacked
from bitpolicy.kernels.dispatch import effective
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import INT8
from bitpolicy.kernels.kernel import Compute, PackedWeight
from bitpolicy.kernels.layers import Quantizable, slides

_ROUNDING = {Compute.INT8: int8_compute.quantize_input, Compute.FP8: fp8_compute.quantize_input}


def rounds_inputs(layer: Quantizable, format: Format, compute: Compute) -> bool:
    """Whether the layer multiplies 8-bit inputs once it is packed. `compute`, its shape and its format decide."""
    return format.packed and effective(compute, packed_weight(layer, format, {})).rounds_inputs


def multiplied_weight(weight: PackedWeight, dtype: torch.dtype, compute: Compute) -> torch.Tensor:
    """The weight that a layer multiplies with once `weight` is packed into it, shape (out, in/groups, *kernel).

    Each output channel depends on its own codes alone.
    """
    if compute is Compute.INT8 and weight.format != INT8 and effective(compute, weight).rounds_inputs:
        weight = replace(weight, format=INT8, tensors=INT8.quantize(unpacked(weight, torch.float32)))
    return unpacked(weight, dtype)


def seen_input(layer: Quantizable, x: torch.Tensor, compute: Compute) -> tuple[torch.Tensor, torch.Tensor]:
    """x_q - z and s_x of the layer's input, float32, as `quantize_input` of that compute mode returns them.

    Args:
        x: (..., in) for a linear layer, (B, in, *spatial) for a convolution, or one sample without B.
    """
    single = not isinstance(layer, nn.Linear) and x.ndim == 1 + len(layer.stride)
    batch = x[None] if single else x
    steps, scale = _ROUNDING[compute](batch, shared(batch.ndim, layer.weight.shape, slides(layer)))
    return (steps[0], scale[0]) if single else (steps, scale)


def round_inputs(layer: Quantizable, compute: Compute) -> RemovableHandle:
    """Round the layer's inputs as `compute` does, until the handle is removed."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        codes, scale = seen_input(layer, x, compute)
        return codes.mul_(scale).to(x.dtype)

    return change_inputs(layer, rounded)


def change_inputs(layer: Quantizable, change: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
    """Pass `change(x)` to the layer instead of x. It runs on the device of x, before any `forward` that offloading
    has put on the layer."""

    def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": change(kwargs["input"])}

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def packed_weight(layer: Quantizable, format: Format, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
    """The layer's weight, stored as `tensors`. The layer gives the shape and the kind; its own tensors are not read."""
    return PackedWeight(format, tuple(layer.weight.shape), tensors, slides(layer))
