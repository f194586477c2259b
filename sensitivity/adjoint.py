"""The adjoint probe: what every layer's quantization error does to the final latent, from a few backward passes.

To first order, a change dW of layer l's weight moves the final latent x_0 by J_l dW. Draw v ~ N(0, I) of the latent's
shape. One backward pass of <v, x_0> through the whole sampling loop gives G_l = J_l^T v for every layer at once, and

    s(l, f) = <G_l, Q_f(W_l) - W_l> = <v, J_l dW>,      E_v[s(l, f)^2]          = |dx_0(l, f)|^2,
                                                        E_v[s(l, f) s(l', f')]  = <dx_0(l, f), dx_0(l', f')>.

This is the adjoint method applied to the sampler, with Hutchinson's estimator (1990) of the norm. One sketch s costs a
dot product per format. The denoiser's calls are checkpointed (Griewank and Walther 2000), so memory holds the latents
of the trajectory and the activations of one call; each layer's gradient is used and freed as soon as it is complete,
step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from bitpolicy.kernels.bias_correction import bias_shift
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.format import Format
from bitpolicy.kernels.layers import Quantizable, quantizable_layers
from bitpolicy.policies.calibration import Calibration
from bitpolicy.sensitivity.trajectory import Sample, Trajectories

_CACHE_BYTES = 2**30  # weight errors are kept when all of them together fit in this; recomputed for each use if not
_HALF_SCALES = [2.0**power for power in (8, 4, 0, -4, -8, -12)]  # of v under float16, largest that stays finite wins


@dataclass(frozen=True)
class Sketch:
    """One backward pass: how a random direction of the final latent sees every layer's error.

    Attributes:
        weight: <G_W, dW>, float32, shape (steps, layers, formats), by scheduler step.
        bias: <G_b, db> of the corrected bias, same shape; zero for a layer without a bias.
    """

    weight: torch.Tensor
    bias: torch.Tensor


class AdjointProbe:
    """Sketches of one pipeline.

    Args:
        trajectories: the pipeline with its call arguments.
        formats: packed formats to score.
        calibration: E[x] per layer, for the corrected bias.
        storage: dtype of the stored weights; errors are taken against the weight in this dtype.
        recompute_inside: also checkpoint inside the denoiser, block by block: less memory, one more forward.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        formats: Sequence[Format],
        calibration: Calibration,
        storage: torch.dtype,
        recompute_inside: bool = False,
    ) -> None:
        self._trajectories, self._recompute_inside = trajectories, recompute_inside
        self._layers = dict(quantizable_layers(trajectories.denoiser))
        self._errors = _Errors(self._layers, formats, calibration, storage)
        self._formats = len(formats)

    def sketches(self, sample: Sample, vectors: Sequence[int]) -> Iterator[Sketch]:
        """One sketch for each random vector, all from one forward trajectory.

        Args:
            vectors: seeds of the random directions. They feed a stream of their own, never the one of the initial
                noise.

        Raises:
            BitPolicyError: the sampling loop cannot be differentiated, or its gradient is not finite.
        """
        calls = _CheckpointedCalls(self._trajectories)
        with (
            _only_these_require_grad(self._trajectories, self._layers.values()),
            calls.installed(self._recompute_inside),
        ):
            latent = self._trajectories.differentiable_latent(sample)
            for i, seed in enumerate(vectors):
                direction = _direction(latent, sample, seed)
                yield self._backward(latent, direction, calls, keep=i + 1 < len(vectors))

    def _backward(self, latent: torch.Tensor, direction: torch.Tensor, calls: _CheckpointedCalls, keep: bool) -> Sketch:
        scales = _HALF_SCALES if latent.dtype == torch.float16 else [1.0]
        for scale in scales:
            record = _Record(self._trajectories.steps, len(self._layers), self._formats, latent.device)
            handles = list(self._hooks(record, calls))
            try:
                last = scale == scales[-1]
                torch.autograd.backward(latent, (direction * scale).to(latent.dtype), retain_graph=keep or not last)
            finally:
                for handle in handles:
                    handle.remove()
            if record.finite():
                return record.sketch(scale)
        raise BitPolicyError(
            "the gradient of the sampling loop is not finite; try --dtype bfloat16 or float32, or --probe ablation"
        )

    def _hooks(self, record: _Record, calls: _CheckpointedCalls) -> Iterator[Any]:
        for index, (name, layer) in enumerate(self._layers.items()):
            yield layer.weight.register_post_accumulate_grad_hook(
                self._hook(record.weight, index, calls, name, "weight")
            )
            if layer.bias is not None:
                yield layer.bias.register_post_accumulate_grad_hook(self._hook(record.bias, index, calls, name, "bias"))

    def _hook(
        self, into: torch.Tensor, index: int, calls: _CheckpointedCalls, name: str, part: str
    ) -> Callable[[torch.Tensor], None]:
        def use_and_free(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            into[calls.step, index] += self._errors.of(name, part) @ gradient.float().flatten()
            parameter.grad = None

        return use_and_free


class _Record:
    """Sketch values of one backward pass, on the device."""

    def __init__(self, steps: int, layers: int, formats: int, device: torch.device) -> None:
        self.weight = torch.zeros(steps, layers, formats, device=device)
        self.bias = torch.zeros(steps, layers, formats, device=device)

    def finite(self) -> bool:
        return bool(torch.isfinite(self.weight).all() and torch.isfinite(self.bias).all())

    def sketch(self, scale: float) -> Sketch:
        return Sketch((self.weight / scale).cpu(), (self.bias / scale).cpu())


class _Errors:
    """dW and db of every layer in every format, as rows of a matrix; kept where they fit in memory."""

    def __init__(
        self,
        layers: Mapping[str, Quantizable],
        formats: Sequence[Format],
        calibration: Calibration,
        storage: torch.dtype,
    ) -> None:
        self._layers, self._formats, self._calibration, self._storage = layers, formats, calibration, storage
        total = sum(layer.weight.numel() for layer in layers.values()) * len(formats) * 4
        self._cache: dict[str, dict[str, torch.Tensor]] | None = {} if total <= _CACHE_BYTES else None

    def of(self, name: str, part: str) -> torch.Tensor:
        """float32, shape (formats, values of the weight or the bias)."""
        if self._cache is None:
            return self._compute(name)[part]
        if name not in self._cache:
            self._cache[name] = self._compute(name)
        return self._cache[name][part]

    def _compute(self, name: str) -> dict[str, torch.Tensor]:
        layer = self._layers[name]
        weight = layer.weight.detach().to(self._storage)
        deltas = [f.dequantize(f.quantize(weight), weight.shape, torch.float32) - weight.float() for f in self._formats]
        errors = {"weight": torch.stack([delta.flatten() for delta in deltas])}
        if layer.bias is not None:
            errors["bias"] = torch.stack([bias_shift(layer, delta, self._calibration[name]) for delta in deltas])
        return errors


class _CheckpointedCalls:
    """Checkpoint every call of the denoiser, and know during the backward pass which step's call is being redone."""

    def __init__(self, trajectories: Trajectories) -> None:
        self._trajectories = trajectories
        self.step = 0

    @contextmanager
    def installed(self, recompute_inside: bool) -> Iterator[None]:
        denoiser: Any = self._trajectories.denoiser
        original, own = denoiser.forward, vars(denoiser).get("forward")
        inside = (
            recompute_inside
            and hasattr(denoiser, "enable_gradient_checkpointing")
            and not denoiser.is_gradient_checkpointing
        )
        if inside:
            denoiser.enable_gradient_checkpointing()
        denoiser.forward = self._wrapped(original)
        try:
            yield
        finally:
            if own is None:
                del denoiser.forward
            else:
                denoiser.forward = own
            if inside:
                denoiser.disable_gradient_checkpointing()

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            step = self._trajectories.steps
            leaves, arguments = pytree.tree_flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
            structure: list[Any] = []

            def run(_anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
                self.step = min(step, self._trajectories.steps - 1) if torch.is_grad_enabled() else step
                filled = list(leaves)
                for place, tensor in zip(places, tensors, strict=True):
                    filled[place] = tensor
                positional, named = pytree.tree_unflatten(filled, arguments)
                outputs, spec = pytree.tree_flatten(original(*positional, **named))
                structure[:] = [spec]
                return tuple(outputs)

            # the anchor requires grad, as nothing else does at the first step, where the graph would be lost without it
            anchor = torch.zeros((), requires_grad=True)
            outputs = checkpoint(
                run, anchor, *(leaves[i] for i in places), use_reentrant=True, preserve_rng_state=False
            )
            return pytree.tree_unflatten(list(outputs), structure[0])

        return forward


@contextmanager
def _only_these_require_grad(trajectories: Trajectories, layers: Any) -> Iterator[None]:
    """Freeze the pipeline but for the weights and biases of `layers`; put everything back afterwards."""
    modules = [module for module in trajectories.pipe.components.values() if isinstance(module, nn.Module)]
    before = {parameter: parameter.requires_grad for module in modules for parameter in module.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for layer in layers:
            layer.weight.requires_grad_(True)
            if layer.bias is not None:
                layer.bias.requires_grad_(True)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


def _direction(latent: torch.Tensor, sample: Sample, seed: int) -> torch.Tensor:
    """v ~ N(0, I), float32, in the shape of the latent, from a stream of its own for each (sample, vector)."""
    words = [0x5EED, sample.seed, seed]
    mixed = 0
    for (
        word
    ) in words:  # splitmix64's finalizer, so that neighbouring seeds do not share a stream with the initial noise
        mixed = ((mixed ^ word) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) & (2**64 - 1)
        mixed ^= mixed >> 31
    generator = torch.Generator("cpu").manual_seed(mixed & (2**63 - 1))
    return torch.randn(latent.shape, generator=generator).to(latent.device)
