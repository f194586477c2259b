"""Hessians for rounding: which changes of a layer's weight its inputs, and the finished image, can see.

A change dW of layer l's weight moves its output at call t and position p by dW x_tp, and the final latent, seen along a
random direction v, by sum_tp g_tp^T dW x_tp, where g is the gradient of <v, x_0> at that output. Taking the g of
different calls and positions for independent, with their power shared out evenly over output channels,

    E_v|dx_0|^2  ~  sum_rows dw^T H dw,     H = sum_tp |g_tp|^2 x_tp x_tp^T,

the *trajectory Hessian*: inputs count as much as the sampler, from that step on, makes of what they cause. With every
|g|^2 = 1 it is the Hessian of the layer's own output error (Frantar et al. 2023, section 2). Few positions carry most
of |g|^2, so the trajectory Hessian is steadied by the other one, both at equal trace.

A grouped convolution has one for each group, of the group's own inputs and outputs. Of rows longer than `WIDEST` only
the blocks on its diagonal are taken, runs of inputs of equal length in wire order.
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
from bitpolicy.sensitivity.probes.directions import Random, stream
from bitpolicy.sensitivity.probes.sketch import only_these_require_grad
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.checkpointed_calls import CheckpointedCalls
from bitpolicy.sensitivity.trajectory.scaled_backward import backward, scales_for
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

POSITIONS = 128  # inputs taken of each call of a layer, drawn at random
WIDEST = 12_288  # K beyond which a Hessian as a whole takes too long to factorize
_ALIGNED = 128  # blocks end where runs of weights that share a scale or a rotation do
_DIRECTION = 0x4E55  # index of the random direction: none that the sketches use
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
    """Second moments of one layer's inputs, in wire order.

    Attributes:
        inputs: sum of x x^T, float32, shape (groups, blocks, k, k).
        seen: sum of |g|^2 x x^T, float32, same shape; None where gradients were not looked at.
    """

    inputs: torch.Tensor
    seen: torch.Tensor | None = None

    @classmethod
    def zeros(cls, shape: tuple[int, int, int], device: torch.device, seen: bool) -> Moments:
        """Of a Hessian of `hessian_shape`."""
        groups, blocks, k = shape
        inputs = torch.zeros(groups, blocks, k, k, device=device)
        return cls(inputs, torch.zeros_like(inputs) if seen else None)

    def add(self, x: torch.Tensor, power: torch.Tensor | None = None) -> None:
        """Inputs x, shape (P, groups, K), of which the image sees `power`, shape (P, groups)."""
        _, blocks, k, _ = self.inputs.shape
        cut = pad(x, (0, blocks * k - x.shape[2])).unflatten(2, (blocks, k)).permute(1, 2, 3, 0).flatten(0, 1)
        self.inputs.flatten(0, 1).baddbmm_(cut, cut.mT)
        if self.seen is not None and power is not None:
            weighed = cut * power.T.repeat_interleave(blocks, 0)[:, None]
            self.seen.flatten(0, 1).baddbmm_(weighed, cut.mT)

    def hessian(self, kind: str) -> torch.Tensor:
        """ "inputs" or "trajectory", float32, shape (groups, blocks, k, k), of mean diagonal 1 or 2 in every group."""
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
        active: whether what runs counts.
    """

    moments: dict[str, Moments]
    seed: int
    seen: bool
    scale: float = 1.0
    active: bool = True
    _streams: dict[str, torch.Generator] = field(default_factory=dict)

    def hook(self, name: str, layer: Quantizable) -> Any:
        shape = hessian_shape(layer)
        # a stream for each layer: what is drawn of one does not depend on which others are measured along
        self._streams[name] = stream(_STREAM, self.seed, crc32(name.encode()))

        def on_forward(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            if not self.active or (self.seen and not _wants_gradient(output)):
                return  # the first pass of a checkpointed call; it comes again
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
    """Up to `count` of the inputs that the layer multiplies, at random.

    Args:
        x: (..., in) for a linear, (B, in, *spatial) for a convolution.
        output: what the layer made of it.

    Returns:
        x, shape (P, groups, K) in wire order, and a function that takes the same positions out of a tensor like
        `output`, shape (P, out).
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
    """Add to `moments` those of the layers `names` over one sample; a layer that is never reached gets none.

    Args:
        seen: weigh inputs by what the finished image sees of them, too, which takes a backward pass; else each counts
            the same.
        scales: of each sample's gradients; what had to be found out is put here, for other layers of the same sample.

    Raises:
        LoopError: `seen`, and the sampling loop cannot be differentiated.
    """
    if not names:
        return
    trajectories.learn(sample)  # whose short runs are not measured
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
    """One backward pass of a random direction through the sampling loop; no gradient of a parameter is kept."""
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
    """The first scale with which the gradients at all outputs are finite, tried by backward passes of their own where
    there is a choice; the last if there is none."""
    tried = scales_for(signal, trajectories.denoisers)
    for scale in tried[: len(tried) - 1]:
        finite: list[torch.Tensor] = []
        with _hooked(partial(_finite_hook, finite), layers):
            backward(signal, v, scale, keep=True)
        if torch.stack(finite).all():
            return scale
    return tried[-1]


def _finite_hook(found: list[torch.Tensor], _name: str, layer: Quantizable) -> Any:
    """Puts into `found`, for each gradient at the layer's output, whether it is finite."""

    def on_forward(_layer: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if _wants_gradient(output):
            output.register_hook(lambda gradient: found.append(torch.isfinite(gradient).all()))

    return layer.register_forward_hook(on_forward)


class _Reached:
    """Scheduler steps at which a gradient arrived; it is freed at once."""

    def __init__(self) -> None:
        self.steps: set[int] = set()
        self._now = 0

    def at(self, step: int) -> None:
        self._now = step

    @contextmanager
    def freeing(self, layers: Mapping[str, Quantizable]) -> Iterator[None]:
        """While the block runs, gradients of the layers' parameters are noted and freed."""
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
