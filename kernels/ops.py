"""The product with a packed weight as torch sees it: eager, under torch.compile and torch.export, and with gradients.

For compilers a product is one opaque operator, `bitpolicy::product`, with a fake kernel that gives its output shape.
Its gradient with respect to the input and the bias is that of the product with the dequantized weight. Rounding the
input passes the gradient straight through (Bengio et al. 2013, section 2.2), so LoRA adapters can be trained around
packed layers. When something else watches or wraps tensors (`vmap`, operator counters), EXACT products run as plain
torch code, because such tools may have no rule for a custom operator.
"""

from __future__ import annotations

from typing import Any

import torch

from bitpolicy.kernels import dispatch
from bitpolicy.kernels.call_text import in_words, read
from bitpolicy.kernels.compute.int8 import multiply
from bitpolicy.kernels.kernel import Compute, PackedWeight, recorded

_ORDINARY = (torch.Tensor, torch.nn.Parameter)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_modes = torch._C._len_torch_dispatch_stack
_any_requires_grad = torch._C._any_requires_grad


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
    """Whether the input carries more than values: a fake or wrapped tensor, or a mode that watches operators."""
    return type(x) not in _ORDINARY or _is_wrapped(x) or _modes() > 0


def arguments(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, compute: Compute
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None, str]:
    """The arguments of the operator, which accepts only tensors and text."""
    return x, list(weight.tensors.values()), bias, in_words(weight, compute)


def _multiplied(x: torch.Tensor, tensors: list[torch.Tensor], bias: torch.Tensor | None, call: str) -> torch.Tensor:
    """The operator's implementation on any device."""
    parsed = read(call)
    weight = parsed.holding(tensors)
    return dispatch.run(dispatch.choose(x, weight, bias, parsed.compute), x, weight, bias)


def _shape_of_product(
    x: torch.Tensor, tensors: list[torch.Tensor], bias: torch.Tensor | None, call: str
) -> torch.Tensor:
    """The operator's fake kernel, for tensors without values."""
    weight = read(call).weight
    return multiply(x, x.new_empty(weight.shape), weight.geometry, bias)


def _with_gradient(
    keys: torch._C.DispatchKeySet, x: torch.Tensor, tensors: list[torch.Tensor], bias: torch.Tensor | None, call: str
) -> torch.Tensor:
    """The operator's autograd kernel.

    Args:
        keys: the dispatch keys still to be served. Usually these are autograd and one device. In that case the device
            kernel is called directly, since another dispatch would take as long as the first one.
    """
    if torch.is_grad_enabled() and _any_requires_grad(x, tensors, bias):
        return _Product.apply(x, bias, call, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        if keys.raw_repr() in _NOTHING_ELSE:
            return _multiplied(x, tensors, bias, call)
        return _product.redispatch(keys & torch._C._after_autograd_keyset, x, tensors, bias, call)


class _Product(torch.autograd.Function):
    """The gradients of a product. Autograd does not track tensors inside a list, so they are separate arguments."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, call: str, *tensors: torch.Tensor) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.call, ctx.shape, ctx.bias = read(call), x.shape, None if bias is None else bias.dtype
        return _product(x, list(tensors), bias, call)  # autograd records nothing in here

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        weight = ctx.call.holding(tensors)
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = _input_gradient(gradient, ctx.shape, weight)
        if ctx.needs_input_grad[1]:
            channel = gradient.ndim - 1 if weight.geometry is None else 1
            to_bias = gradient.sum([dim for dim in range(gradient.ndim) if dim != channel]).to(ctx.bias)
        return to_x, to_bias, None, *[None] * len(tensors)


def _input_gradient(gradient: torch.Tensor, shape: torch.Size, weight: PackedWeight) -> torch.Tensor:
    g, w = weight.geometry, weight.dequantize(gradient.dtype)
    if g is None:
        return gradient @ w
    x = gradient.new_empty(1).expand(shape)  # only its shape is used
    still, wanted = [0] * len(g.stride), [True, False, False]
    return torch.ops.aten.convolution_backward(
        gradient, x, w, None, g.stride, g.padding, g.dilation, False, still, g.groups, wanted
    )[0]


def _autograd_and(device: str) -> int:
    """The key set of a plain tensor on this device."""
    own, autograd = (getattr(torch._C.DispatchKey, name) for name in (device, f"Autograd{device}"))
    return (torch._C.DispatchKeySet(own) | torch._C.DispatchKeySet(autograd)).raw_repr()


_NOTHING_ELSE = {_autograd_and(device) for device in ("CPU", "CUDA")}
_library = torch.library.Library("bitpolicy", "FRAGMENT")
_library.define(
    "product(Tensor x, Tensor[] tensors, Tensor? bias, str call) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.impl("product", _multiplied, "CompositeExplicitAutograd")
_library.impl("product", _with_gradient, "Autograd", with_keyset=True)
torch.library.register_fake("bitpolicy::product", _shape_of_product, lib=_library)
_product = torch.ops.bitpolicy.product.default
