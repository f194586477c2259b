"""What rounding a layer's inputs does to the final latent. This part of its error is not in the weight's gradient.

Under activation quantization, a layer multiplies with Q(x) instead of x. Let an amount a lead from one to the other,

    x' = x + a (Q(x) - x),    a = 0,    d<v, x_0> / da = sum over calls <g, Q(x) - x>,

with g the gradient of <v, x_0> at the input of this one layer. To first order, this is the effect of all its calls
together, whatever the packed format of its weight; under FP8, MXFP8 and NVFP4 compute, only the formats that they
multiply have it. Each layer has its own amount. So when several layers share an input (q, k and v), each of them counts
only its own use of that input. An amount collects its gradient as a weight does, call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import Quantizable
from bitpolicy.policies.rounded_layers import change_inputs, rounds_inputs, seen_input
from bitpolicy.sensitivity.rounding.candidates import Candidate


class InputRounding:
    """The amounts of the layers that round their inputs when packed in some candidate's format.

    Attributes:
        amounts: layer name -> a, float32, shape (), on the device of its weight; empty under exact compute.
    """

    def __init__(self, layers: Mapping[str, Quantizable], candidates: Sequence[Candidate], compute: Compute) -> None:
        formats = {candidate.format for candidate in candidates}
        self._compute = compute
        self._layers = {
            name: layer for name, layer in layers.items() if any(rounds_inputs(layer, f, compute) for f in formats)
        }
        self.amounts = {
            name: torch.zeros((), device=layer.weight.device, requires_grad=True)
            for name, layer in self._layers.items()
        }

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While the block runs, layers that compute with gradients depend on their amounts. No value changes."""
        handles = [self._hooked(layer, self.amounts[name]) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooked(self, layer: Quantizable, amount: torch.Tensor) -> RemovableHandle:
        seen = partial(seen_input, layer, compute=self._compute)

        def partly(x: torch.Tensor) -> torch.Tensor:
            # without gradients, this is the first pass of a checkpointed call, which runs again
            return _Rounded.apply(x, amount, seen) if torch.is_grad_enabled() else x

        return change_inputs(layer, partly)


class _Rounded(torch.autograd.Function):
    """x + a (Q(x) - x) at a = 0. The backward pass needs x, which the layer keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, amount: torch.Tensor, seen: Callable[..., Any]) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.seen, ctx.device = seen, amount.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        change = ctx.seen(x).sub_(x)
        product = torch.dot(change.flatten(), gradient.float().flatten()).to(ctx.device)
        return gradient if ctx.needs_input_grad[0] else None, product, None
