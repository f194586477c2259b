"""Ordinary layers under INT8 compute: what packed layers then multiply, in floats.

    y = Q(x) W_q^T + b,    Q(x) = s_x x_q,    W_q = s_w w_q

with the codes and scales of `bitpolicy.kernels.int8_compute`. Results are those of an INT8 kernel up to the rounding of
float sums; where that moves a later input across a tie, one of its codes is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bitpolicy.kernels.format import Format
from bitpolicy.kernels.formats import INT8
from bitpolicy.kernels.int8_compute import rounded_input, suits, weight_codes
from bitpolicy.kernels.kernel import Compute, Geometry, PackedWeight
from bitpolicy.kernels.layers import Quantizable


def rounds_inputs(layer: Quantizable, compute: Compute) -> bool:
    """Whether the layer, once it is packed, multiplies 8-bit inputs: by `compute` and its shape alone."""
    return compute is Compute.INT8 and suits(_packed(layer, INT8, {}))


def multiplied_weight(
    layer: Quantizable, format: Format, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, compute: Compute
) -> torch.Tensor:
    """The weight that the layer multiplies with once `tensors` are packed into it, shape (out, in/groups, *kernel).

    Args:
        layer: says what kind of layer it is; its own tensors are not read.
    """
    shape = tuple(layer.weight.shape)
    if not rounds_inputs(layer, compute):
        return format.dequantize(tensors, shape, dtype)
    codes, scale = weight_codes(_packed(layer, format, tensors))
    return INT8.dequantize({"weight_packed": codes, "weight_scale": scale}, shape, dtype)


def round_inputs(layer: Quantizable) -> RemovableHandle:
    """Round what the layer is given from now on, until the handle is removed.

    It happens before any `forward` that offloading has put on the layer, on the device where the input is.
    """
    per_sample = not isinstance(layer, nn.Linear)

    def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (rounded_input(args[0], per_sample), *args[1:]), kwargs
        return args, {**kwargs, "input": rounded_input(kwargs["input"], per_sample)}

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def _packed(layer: Quantizable, format: Format, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
    geometry = None
    if not isinstance(layer, nn.Linear):
        padding = (0,) * len(layer.stride) if isinstance(layer.padding, str) else layer.padding
        geometry = Geometry(layer.stride, padding, layer.dilation, layer.groups)
    return PackedWeight(format, tuple(layer.weight.shape), tensors, geometry)
