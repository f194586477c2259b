"""Hessians for rounding: how much a change of a layer's weight affects the layer's output and the finished image.

A change dW of layer l's weight moves its output at call t and position p by dW x_tp. Along a probe vector v, it moves
the final latent by sum_tp g_tp^T dW x_tp, where g is the gradient of <v, x_0> at that output. If the g of different
calls and positions are independent, with equal power in all output channels,

    E_v|dx_0|^2  ~  sum_rows dw^T H dw,     H = sum_tp |g_tp|^2 x_tp x_tp^T.

This is the *trajectory Hessian*. It weights each input by how much the sampler, from that step on, amplifies the error
that the input causes. With every |g|^2 = 1 it is the Hessian of the layer's own output error (Frantar et al. 2023,
section 2). Few positions carry most of |g|^2, so the two Hessians are added at equal trace, which makes the sum
steadier.

A grouped convolution has one Hessian for each group, from the group's own inputs and outputs. For rows longer than
`WIDEST`, only the blocks on the diagonal are computed. Each block covers the same number of consecutive inputs in
storage order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import ceil, prod
from typing import Any
from zlib import crc32

import torch
from torch import nn
from torch.nn.functional import pad

from bitpolicy.kernels.layers import Quantizable
from bitpolicy.kernels.quantizers.bias_correction import patches
from bitpolicy.sensitivity.probes.adjoint import require_uncut
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches.directions import Random, stream
from bitpolicy.sensitivity.sketches.sketch import only_these_require_grad
from bitpolicy.sensitivity.trajectory.checkpointed_calls import CheckpointedCalls
from bitpolicy.sensitivity.trajectory.scaled_backward import backward, scales_for
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

POSITIONS = 128  # inputs drawn at random from each call of a layer
WIDEST = 12_288  # K beyond which a whole Hessian takes too long to factorize
_ALIGNED = 128  # blocks end where groups of weights that share a scale or a rotation end
_DIRECTION = 0x4E55  # index of the probe vector, which no sketch uses
_STREAM = 0x9E55


def hessian_shape(layer: Quantizable) -> tuple[int, int, int]:
    """(groups, blocks, k) of a layer's Hessian, whose blocks are k x k."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    length = layer.weight[0].numel()
    if length <= WIDEST:
        return groups, 1, length
    k = ceil(length / ceil(length / WIDEST) / _ALIGNED) * _ALIGNED
    return groups, ceil(length / k), k


@dataclass
class Moments:
    """Second moments of one layer's inputs, in storage order.

    Attributes:
        inputs: sum of x x^T, float32, shape (groups, blocks, k, k).
        seen: sum of |g|^2 x x^T, float32, same shape; None if no gradients were taken.
    """

    inputs: torch.Tensor
    seen: torch.Tensor | None = None

    @classmethod
    def zeros(cls, shape: tuple[int, int, int], device: torch.device, seen: bool) -> Moments:
        """Zero moments for a Hessian of shape `hessian_shape`."""
        groups, blocks, k = shape
        inputs = torch.zeros(groups, blocks, k, k, device=device)
        return cls(inputs, torch.zeros_like(inputs) if seen else None)

    def add(self, x: torch.Tensor, power: torch.Tensor | None = None) -> None:
        """Add inputs x, shape (P, groups, K), weighted in `seen` by `power`, which is |g|^2, shape (P, groups)."""
        _, blocks, k, _ = self.inputs.shape
        cut = pad(x, (0, blocks * k - x.shape[2])).unflatten(2, (blocks, k)).permute(1, 2, 3, 0).flatten(0, 1)
        self.inputs.flatten(0, 1).baddbmm_(cut, cut.mT)
        if self.seen is not None and power is not None:
            weighed = cut * power.T.repeat_interleave(blocks, 0)[:, None]
            self.seen.flatten(0, 1).baddbmm_(weighed, cut.mT)

    def hessian(self, kind: str) -> torch.Tensor:
        """The Hessian, float32, shape (groups, blocks, k, k), with mean diagonal 1 or 2 in every group.

        Args:
            kind: "inputs" or "trajectory".
        """
        steady = _scaled(self.inputs)
        return steady if kind == "inputs" or self.seen is None else steady + _scaled(self.seen)


def _scaled(moments: torch.Tensor) -> torch.Tensor:
    mean = moments.diagonal(dim1=-2, dim2=-1).mean((1, 2))[:, None, None, None]
    return torch.where(torch.isfinite(mean) & (mean > 0), moments / mean, 0.0)


@dataclass
class _Watch:
    """Adds to the moments of some layers while a trajectory, or a backward pass, runs.

    Attributes:
        scale: of the gradients that arrive.
        active: whether to add what runs now.
    """

    moments: dict[str, Moments]
    seed: int
    seen: bool
    scale: float = 1.0
    active: bool = True
    _streams: dict[str, torch.Generator] = field(default_factory=dict)

    def hook(self, name: str, layer: Quantizable) -> Any:
        shape = hessian_shape(layer)
        # one stream per layer, so that its draws do not depend on which other layers are measured
        self._streams[name] = stream(_STREAM, self.seed, crc32(name.encode()))

        def on_forward(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            if not self.active or (self.seen and not _wants_gradient(output)):
                return  # the first pass of a checkpointed call, which runs again
            given = args[0] if args else kwargs["input"]
            x, taken = drawn_inputs(layer, given.detach(), output, POSITIONS, self._streams[name])
            if self.seen:
                output.register_hook(lambda gradient: self._add(name, shape, x, self._power(taken(gradient), shape[0])))
            else:
                self._add(name, shape, x, None)

        return layer.register_forward_hook(on_forward, with_kwargs=True)

    def _power(self, gradient: torch.Tensor, groups: int) -> torch.Tensor:
        """|g|^2 of each position and group, float32, shape (P, groups)."""
        return (gradient.float() / self.scale).unflatten(1, (groups, -1)).square().sum(2)

    def _add(self, name: str, shape: tuple[int, int, int], x: torch.Tensor, power: torch.Tensor | None) -> None:
        if name not in self.moments:
            self.moments[name] = Moments.zeros(shape, x.device, self.seen)
        self.moments[name].add(x.float(), power)


def _wants_gradient(output: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and output.requires_grad


def drawn_inputs(
    layer: Quantizable, x: torch.Tensor, output: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, Any]:
    """A random choice of up to `count` of the inputs that the layer multiplies.

    Args:
        x: (..., in) for a linear layer, (B, in, *spatial) for a convolution.
        output: the layer's output for `x`.

    Returns:
        The chosen inputs, shape (P, groups, K) in storage order, and a function that takes the same positions from a
        tensor like `output`, shape (P, out).
    """
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        chosen = _draw(len(rows), count, generator).to(x.device)
        return rows[chosen][:, None], lambda like: like.reshape(-1, like.shape[-1])[chosen]
    spatial = output.shape[2:]
    chosen = _draw(x.shape[0] * prod(spatial), count, generator).to(x.device)
    where = torch.unravel_index(chosen, (x.shape[0], *spatial))
    in_wire_order = patches(layer, x).movedim(1, -1)[where].unflatten(-1, (layer.groups, -1))
    return in_wire_order.movedim(-2, 1).flatten(2), lambda like: like.movedim(1, -1)[where]


def _draw(total: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.arange(total) if total <= count else torch.randperm(total, generator=generator)[:count]


def measure_moments(
    trajectories: Trajectories,
    moments: dict[str, Moments],
    names: Sequence[str],
    sample: Sample,
    seen: bool,
    recompute_inside: bool,
    scales: dict[Sample, float] | None = None,
) -> None:
    """Add the moments of the layers `names` over one sample to `moments`. A layer that is never reached gets none.

    Args:
        seen: also weight inputs by their effect on the finished image, which takes a backward pass. Otherwise each
            input counts the same.
        scales: scales of the samples' gradients. A scale found here is added, for other layers of the same sample.

    Raises:
        LoopError: `seen`, and the sampling loop cannot be differentiated.
    """
    if not names:
        return
    trajectories.learn(sample)  # its short runs must not be measured
    layers = trajectories.target.layers
    watch = _Watch(moments, sample.seed, seen)
    with _hooked(watch.hook, {name: layers[name] for name in names}):
        if seen:
            _backward(trajectories, watch, sample, recompute_inside, {} if scales is None else scales)
        else:
            next(trajectories.signals([sample]))


@contextmanager
def _hooked(hook: Callable[[str, Quantizable], Any], layers: Mapping[str, Quantizable]) -> Iterator[None]:
    handles = [hook(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _backward(
    trajectories: Trajectories, watch: _Watch, sample: Sample, recompute_inside: bool, scales: dict[Sample, float]
) -> None:
    """One backward pass of a probe vector through the sampling loop. It keeps no gradient of a parameter."""
    layers = trajectories.target.layers
    trajectories.end(sample)
    reached = _Reached()
    calls = CheckpointedCalls(trajectories, reached.at)
    with only_these_require_grad(trajectories, layers), calls.installed(recompute_inside), reached.freeing(layers):
        signal = trajectories.differentiable_signal(sample)
        require_uncut(calls.cut)
        v = Random(_DIRECTION).vector(signal, sample)
        if sample not in scales:
            watch.active = False
            scales[sample] = _scale(signal, v, trajectories, layers)
        watch.scale, watch.active = scales[sample], True
        calls.new_backward()
        backward(signal, v, watch.scale, keep=False)
    require_uncut(calls.not_redone | (calls.steps - reached.steps))


def _scale(
    signal: torch.Tensor, v: torch.Tensor, trajectories: Trajectories, layers: Mapping[str, Quantizable]
) -> float:
    """The first scale with which the gradients at all outputs are finite, or the last scale if there is none.

    If there are several scales, separate backward passes try them.
    """
    tried = scales_for(signal, trajectories.denoisers)
    for scale in tried[: len(tried) - 1]:
        finite: list[torch.Tensor] = []
        with _hooked(partial(_finite_hook, finite), layers):
            backward(signal, v, scale, keep=True)
        if torch.stack(finite).all():
            return scale
    return tried[-1]


def _finite_hook(found: list[torch.Tensor], _name: str, layer: Quantizable) -> Any:
    """A hook that appends to `found`, for each gradient at the layer's output, whether it is finite."""

    def on_forward(_layer: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if _wants_gradient(output):
            output.register_hook(lambda gradient: found.append(torch.isfinite(gradient).all()))

    return layer.register_forward_hook(on_forward)


class _Reached:
    """Records the scheduler steps at which a gradient arrived, and frees each gradient at once."""

    def __init__(self) -> None:
        self.steps: set[int] = set()
        self._now = 0

    def at(self, step: int) -> None:
        self._now = step

    @contextmanager
    def freeing(self, layers: Mapping[str, Quantizable]) -> Iterator[None]:
        """While the block runs, gradients of the layers' parameters are recorded and freed."""
        parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
        handles = [parameter.register_post_accumulate_grad_hook(self._forget) for parameter in parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forget(self, parameter: torch.Tensor) -> None:
        self.steps.add(self._now)
        parameter.grad = None
