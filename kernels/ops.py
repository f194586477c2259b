"""The product with a packed weight as torch sees it: eager, traced by torch.compile and torch.export, with gradients.

To compilers a product is one operator, `bitpolicy::product`, which they cannot look into, with a fake kernel that tells
its shape. Its gradient with respect to the input and the bias is that of the product with the dequantized weight:
rounding the input passes the gradient straight through (Bengio et al. 2013, section 2.2), so that LoRA adapters can be
trained around packed layers. EXACT products are plain torch code to whatever else watches or wraps tensors (`vmap`,
counters), which may have no rule for an operator of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from bitpolicy.kernels import dispatch
from bitpolicy.kernels.formats import format_named
from bitpolicy.kernels.int8_compute import multiply
from bitpolicy.kernels.kernel import Compute, Geometry, PackedWeight, recorded

_ORDINARY = (torch.Tensor, torch.nn.Parameter)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_modes = torch._C._len_torch_dispatch_stack
_STILL = [0]  # a linear layer; autograd takes an empty list for one of tensors


def product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, compute: Compute) -> torch.Tensor:
    """x W^T + b, or x * W + b, in the dtype of `x`.

    Args:
        x: any float; (..., in) for a linear layer, (B, in, *spatial) for a convolution.
        bias: shape (out), in the dtype of `x`.
        compute: what this layer may round.
    """
    compute = Compute.EXACT if x.dtype == torch.float64 else compute
    exact, compiling = compute is Compute.EXACT, torch.compiler.is_compiling()
    traced = not compiling and _is_traced(x)
    if exact and traced:
        return multiply(x, weight.dequantize(x.dtype), weight.geometry, bias)
    if compiling or traced or (not exact and recorded(x, bias)):
        return _product(*arguments(x, weight, bias, compute))
    return dispatch.run(dispatch.choose(x, weight, bias, compute), x, weight, bias)


def _is_traced(x: torch.Tensor) -> bool:
    """Whether something else than values goes through: a fake or wrapped tensor, or a mode that watches operators."""
    return type(x) not in _ORDINARY or _is_wrapped(x) or _modes() > 0


def arguments(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, compute: Compute
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None, str, list[int], list[int], bool, str]:
    """What the operator is called with: it knows tensors, numbers and text."""
    g = weight.geometry
    slides = _STILL if g is None else [*g.stride, *g.padding, *g.dilation, g.groups]
    tensors = list(weight.tensors.values())
    return x, tensors, bias, weight.format.name, list(weight.shape), slides, weight.low_memory, compute.value


def _weight(
    tensors: Sequence[torch.Tensor], format: str, shape: Sequence[int], slides: Sequence[int], low_memory: bool = False
) -> PackedWeight:
    """What `arguments` took apart."""
    known = _format(format)
    names = known.tensors(shape, torch.float16)
    held = dict(zip(names, tensors, strict=True))
    return PackedWeight(known, tuple(shape), held, _geometry(slides), low_memory)


_format = lru_cache(format_named)


def _geometry(slides: Sequence[int]) -> Geometry | None:
    if list(slides) == _STILL:
        return None
    dims = len(slides) // 3
    stride, padding, dilation = (tuple(slides[i * dims : (i + 1) * dims]) for i in range(3))
    return Geometry(stride, padding, dilation, slides[-1])


@torch.library.custom_op("bitpolicy::product", mutates_args=())
def _product(
    x: torch.Tensor,
    tensors: list[torch.Tensor],
    bias: torch.Tensor | None,
    format: str,
    shape: list[int],
    slides: list[int],
    low_memory: bool,
    compute: str,
) -> torch.Tensor:
    weight = _weight(tensors, format, shape, slides, low_memory)
    return dispatch.run(dispatch.choose(x, weight, bias, Compute(compute)), x, weight, bias)


@_product.register_fake
def _shape_of_product(
    x: torch.Tensor,
    tensors: list[torch.Tensor],
    bias: torch.Tensor | None,
    format: str,
    shape: list[int],
    slides: list[int],
    low_memory: bool,
    compute: str,
) -> torch.Tensor:
    return multiply(x, x.new_empty(shape), _geometry(slides), bias)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, tensors, bias, *weight, _, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.shape, ctx.weight, ctx.bias = x.shape, weight, None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = _input_gradient(gradient, ctx.shape, _weight(tensors, *ctx.weight))
    if ctx.needs_input_grad[2]:
        channel = gradient.ndim - 1 if list(ctx.weight[-1]) == _STILL else 1
        to_bias = gradient.sum([dim for dim in range(gradient.ndim) if dim != channel]).to(ctx.bias)
    return to_x, [None] * len(tensors), to_bias, None, None, None, None, None


def _input_gradient(gradient: torch.Tensor, shape: torch.Size, weight: PackedWeight) -> torch.Tensor:
    g, w = weight.geometry, weight.dequantize(gradient.dtype)
    if g is None:
        return gradient @ w
    x = gradient.new_empty(1).expand(shape)  # only its shape is looked at
    still, wanted = [0] * len(g.stride), [True, False, False]
    return torch.ops.aten.convolution_backward(
        gradient, x, w, None, g.stride, g.padding, g.dilation, False, still, g.groups, wanted
    )[0]


_product.register_autograd(_backward, setup_context=_keep_for_backward)
