"""Hessians for rounding: which changes of a layer's weight its inputs, and the finished image, can see.

A change dW of layer l's weight moves its output at call t and position p by dW x_tp, and the final latent, seen along a
random direction v, by sum_tp g_tp^T dW x_tp, where g is the gradient of <v, x_0> at that output. Taking the g of
different calls and positions for independent, with their power shared out evenly over output channels,

    E_v|dx_0|^2  ~  sum_rows dw^T H dw,     H = sum_tp |g_tp|^2 x_tp x_tp^T,

the *trajectory Hessian*: inputs count as much as the sampler, from that step on, makes of what they cause. With every
|g|^2 = 1 it is the Hessian of the layer's own output error (Frantar et al. 2023, section 2). Few positions carry most
of |g|^2, so the trajectory Hessian is steadied by the other one, both at equal trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from bitpolicy.kernels.bias_correction import patches
from bitpolicy.kernels.layers import Quantizable, quantizable_layers
from bitpolicy.sensitivity.adjoint import require_uncut
from bitpolicy.sensitivity.checkpointed_calls import CheckpointedCalls
from bitpolicy.sensitivity.directions import Random, stream
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketch import only_these_require_grad
from bitpolicy.sensitivity.trajectory import LoopError, Trajectories

POSITIONS = 128  # inputs taken of each call of a layer, drawn at random
_DIRECTION = 0x4E55  # index of the random direction: none that the sketches use
_STREAM = 0x9E55


@dataclass
class Moments:
    """Second moments of one layer's inputs, in wire order.

    Attributes:
        inputs: sum of x x^T, float32, shape (K, K).
        seen: sum of |g|^2 x x^T, float32, shape (K, K).
    """

    inputs: torch.Tensor
    seen: torch.Tensor

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> Moments:
        return cls(torch.zeros(size, size, device=device), torch.zeros(size, size, device=device))

    def add(self, x: torch.Tensor, power: torch.Tensor) -> None:
        """Rows x, shape (P, K), of which the image sees `power`, shape (P)."""
        self.inputs.addmm_(x.T, x)
        self.seen.addmm_((x * power[:, None]).T, x)

    def hessian(self, kind: str) -> torch.Tensor:
        """ "inputs" or "trajectory", float32, shape (K, K), of mean diagonal 1 or 2."""
        steady = _scaled(self.inputs)
        return steady if kind == "inputs" else steady + _scaled(self.seen)


def _scaled(moments: torch.Tensor) -> torch.Tensor:
    mean = moments.diagonal().mean()
    return moments / mean if torch.isfinite(mean) and mean > 0 else torch.zeros_like(moments)


@dataclass
class _Watch:
    """Adds to the moments of some layers while a trajectory, or a backward pass, runs."""

    moments: dict[str, Moments]
    generator: torch.Generator
    seen: bool

    def hook(self, name: str, layer: Quantizable) -> Any:
        def on_forward(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            if self.seen and not (torch.is_grad_enabled() and output.requires_grad):
                return  # the first pass of a checkpointed call; it comes again
            given = args[0] if args else kwargs["input"]
            x, rows = drawn_inputs(layer, given.detach(), output, POSITIONS, self.generator)
            if self.seen:
                output.register_hook(lambda gradient: self._add(name, x, rows(gradient).float().square().sum(1)))
            else:
                self._add(name, x, x.new_ones(len(x)))

        return layer.register_forward_hook(on_forward, with_kwargs=True)

    def _add(self, name: str, x: torch.Tensor, power: torch.Tensor) -> None:
        if name not in self.moments:
            self.moments[name] = Moments.zeros(x.shape[1], x.device)
        self.moments[name].add(x.float(), power.float())


def drawn_inputs(
    layer: Quantizable, x: torch.Tensor, output: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, Any]:
    """Up to `count` of the inputs that the layer multiplies, at random.

    Args:
        x: (..., in) for a linear, (B, in, *spatial) for a convolution.
        output: what the layer made of it.

    Returns:
        x, shape (P, K) in wire order, and a function that takes the same positions out of a tensor like `output`, shape
        (P, out).
    """
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        chosen = _draw(len(rows), count, generator).to(x.device)
        return rows[chosen], lambda like: like.reshape(-1, like.shape[-1])[chosen]
    spatial = output.shape[2:]
    chosen = _draw(x.shape[0] * prod(spatial), count, generator).to(x.device)
    where = torch.unravel_index(chosen, (x.shape[0], *spatial))
    in_wire_order = patches(layer, x).movedim(1, -1)
    return in_wire_order[where].flatten(1), lambda like: like.movedim(1, -1)[where]


def _draw(total: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.arange(total) if total <= count else torch.randperm(total, generator=generator)[:count]


def has_hessian(layer: Quantizable) -> bool:
    """Grouped convolutions have one for each group, which is not provided for."""
    return isinstance(layer, nn.Linear) or layer.groups == 1


def measure_moments(
    trajectories: Trajectories,
    moments: dict[str, Moments],
    names: Sequence[str],
    sample: Sample,
    seen: bool,
    recompute_inside: bool,
) -> None:
    """Add to `moments` those of the layers `names` over one sample; a layer that is never reached gets none.

    Args:
        seen: weigh inputs by what the finished image sees of them, too, which takes a backward pass; else each counts
            the same.

    Raises:
        LoopError: `seen`, and the sampling loop cannot be differentiated.
    """
    if not names:
        return
    layers = dict(quantizable_layers(trajectories.denoiser))
    watch = _Watch(moments, stream(_STREAM, sample.seed), seen)
    with _hooked(watch, {name: layers[name] for name in names}):
        if seen:
            _backward(trajectories, layers, sample, recompute_inside)
        else:
            next(trajectories.signals([sample]))


@contextmanager
def _hooked(watch: _Watch, layers: Mapping[str, Quantizable]) -> Iterator[None]:
    handles = [watch.hook(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _backward(
    trajectories: Trajectories, layers: Mapping[str, Quantizable], sample: Sample, recompute_inside: bool
) -> None:
    """One backward pass of a random direction through the sampling loop; no gradient of a parameter is kept."""
    trajectories.end(sample)
    reached = _Reached()
    calls = CheckpointedCalls(trajectories, reached.at)
    with only_these_require_grad(trajectories, layers), calls.installed(recompute_inside):
        parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
        handles = [parameter.register_post_accumulate_grad_hook(reached.forget) for parameter in parameters]
        try:
            signal = trajectories.differentiable_signal(sample)
            require_uncut(calls.cut)
            v = Random(_DIRECTION).vector(signal, sample)
            torch.autograd.backward(signal, v.to(signal.dtype))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a tensor of the graph was changed in place
            raise LoopError(f"the sampling loop cannot be differentiated: {error}") from error
        finally:
            for handle in handles:
                handle.remove()
    require_uncut(calls.not_redone | (calls.steps - reached.steps))


class _Reached:
    """Scheduler steps at which a gradient arrived; it is freed at once."""

    def __init__(self) -> None:
        self.steps: set[int] = set()
        self._now = 0

    def at(self, step: int) -> None:
        self._now = step

    def forget(self, parameter: torch.Tensor) -> None:
        self.steps.add(self._now)
        parameter.grad = None
