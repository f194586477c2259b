"""Checkpoints every call of the denoisers (Griewank and Walther 2000).

Memory then holds the latents of a trajectory and the activations of one call. Studied models outside the loop (text
encoders and the decoder) are checkpointed as well: otherwise their activations would stay in memory during every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from bitpolicy.policies.components import is_autoencoder
from bitpolicy.sensitivity.trajectory.decoding import replaced_method
from bitpolicy.sensitivity.trajectory.graphless_methods import gradients_pass
from bitpolicy.sensitivity.trajectory.opened_objects import opened
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

_LARGE = 500_000_000  # parameters from which models are also checkpointed inside, block by block


def is_large(trajectories: Trajectories) -> bool:
    """Whether the models are so large that gradients need checkpoints inside the models, too."""
    models = [*trajectories.denoisers, *trajectories.outside.values()]
    return sum(p.numel() for model in models for p in model.parameters()) >= _LARGE


class CheckpointedCalls:
    """Checkpoints calls, and reports during the backward pass which step's call is recomputed.

    Attributes:
        steps: scheduler steps at which a studied denoiser was called in the last forward pass.
        cut: steps at which any denoiser was called and that no gradient reaches: the call was made under `no_grad`, or
            the next call got a detached sample.
        called: names of the studied models outside the loop that were called.
    """

    def __init__(self, trajectories: Trajectories, on_step: Callable[[int], None]) -> None:
        self._trajectories, self._on_step = trajectories, on_step
        self.steps: set[int] = set()
        self.cut: set[int] = set()
        self.called: set[str] = set()
        self._all_steps: set[int] = set()
        self._redone: set[int] = set()
        self._settings: dict[int, _Settings] = {}  # at the last call of each denoiser, by its id

    @property
    def not_redone(self) -> set[int]:
        """Steps at which a denoiser, studied or not, was called and that the last backward pass did not reach."""
        return self._all_steps - self._redone

    @contextmanager
    def installed(self, recompute_inside: bool) -> Iterator[None]:
        """Checkpoint calls while the block runs.

        Args:
            recompute_inside: also checkpoint inside denoisers and autoencoders that support it, block by block.
        """
        self.steps, self.cut, self.called, self._all_steps, self._redone = set(), set(), set(), set(), set()
        studied = self._trajectories.studied_denoisers
        with ExitStack() as stack:
            for denoiser in self._trajectories.denoisers:
                if recompute_inside:
                    stack.enter_context(_block_checkpoints(denoiser))
                stack.enter_context(gradients_pass(denoiser))
                wrap = self._in_loop(denoiser, any(denoiser is model for model in studied))
                stack.enter_context(replaced_method(denoiser, "forward", wrap))
            for name, model in self._trajectories.outside.items():
                if is_autoencoder(model):
                    stack.enter_context(_in_float32(model))
                    if recompute_inside:
                        stack.enter_context(_block_checkpoints(model))
                method = "decode" if is_autoencoder(model) else "forward"
                stack.enter_context(replaced_method(model, method, self._outside(name, model)))
            self._settings = {}
            before = [_Settings.of(denoiser) for denoiser in self._trajectories.denoisers]
            try:
                yield
            finally:
                for settings in before:
                    settings.restore()

    def new_backward(self) -> None:
        """Start a new backward pass."""
        self._redone = set()

    def _in_loop(self, denoiser: nn.Module, studied: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                step = self._trajectories.steps
                if not (studied or _any_requires_grad((args, kwargs))):
                    return original(*args, **kwargs)  # nothing studied comes before this call
                if not torch.is_grad_enabled():
                    self.cut.add(step)
                elif self._all_steps - {step} and not _any_requires_grad((args, kwargs)):
                    self.cut.add(step - 1)
                self._all_steps.add(step)
                if studied:
                    self.steps.add(step)
                settings = self._settings_now(denoiser)
                return _checkpointed(original, args, kwargs, lambda: self._redo(step, settings))

            return forward

        return wrap

    def _settings_now(self, denoiser: nn.Module) -> _Settings:
        """The settings of a denoiser. Equal ones are kept once."""
        found, known = _Settings.of(denoiser), self._settings.get(id(denoiser))
        if known is None or not found.equals(known):
            self._settings[id(denoiser)] = found
        return self._settings[id(denoiser)]

    def _redo(self, step: int, settings: _Settings) -> None:
        """Record that a call begins, for the first time or again in the backward pass."""
        self._on_step(step)
        if torch.is_grad_enabled():
            self._redone.add(step)
            settings.restore()

    def _outside(self, name: str, model: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.called.add(name)
                given, named = pytree.tree_map(lambda leaf: _as_float32(leaf, model), (args, kwargs))
                return _checkpointed(original, given, named, lambda: None)

            return call

        return wrap


class _Settings:
    """The attributes and children of every module in a model.

    Some pipelines change them from call to call, or for the time of their loop: other attention processors (perturbed
    attention), switches of layers (GLIGEN). A call that is computed again needs those of its first time.
    """

    def __init__(self, modules: list[tuple[nn.Module, dict[str, Any], dict[str, nn.Module | None]]]) -> None:
        self._modules = modules

    @classmethod
    def of(cls, model: nn.Module) -> _Settings:
        return cls([(module, _attributes(module), dict(module._modules)) for module in model.modules()])

    def equals(self, other: _Settings) -> bool:
        """Whether each attribute and child is the same object."""
        if len(self._modules) != len(other._modules):
            return False
        pairs = zip(self._modules, other._modules, strict=True)
        return all(a is b and _same(c, d) and _same(e, f) for (a, c, e), (b, d, f) in pairs)

    def restore(self) -> None:
        for module, attributes, children in self._modules:
            for name in _attributes(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            if not _same(module._modules, children):
                module._modules.clear()
                module._modules.update(children)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Those that are not torch's own."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


def _any_requires_grad(arguments: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(arguments))


def _checkpointed(original: Callable[..., Any], args: Any, kwargs: Any, at_start: Callable[[], None]) -> Any:
    """`original(*args, **kwargs)`, keeping only its arguments. Every tensor in them becomes a separate argument, even
    one that an object holds."""
    leaves, arguments = pytree.tree_flatten(opened((args, kwargs)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    structure: list[Any] = []

    def run(_anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        at_start()
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        positional, named = pytree.tree_unflatten(filled, arguments)
        outputs, spec = pytree.tree_flatten(opened(original(*positional, **named)))
        structure[:] = [spec]
        return tuple(outputs)

    # at the first step nothing else requires grad, and the graph would be lost without the anchor
    anchor = torch.zeros((), requires_grad=True)
    # Some pipelines write the next sample into the same tensor, and the backward pass needs this one.
    tensors = [leaves[i].clone() if i == places[0] else leaves[i] for i in places]
    outputs = checkpoint(run, anchor, *tensors, use_reentrant=True, preserve_rng_state=False)
    return pytree.tree_unflatten(list(outputs), structure[0])


@contextmanager
def _block_checkpoints(model: Any) -> Iterator[None]:
    """Turn on diffusers' own checkpoints, one per block, while the block runs. If they were on before, they stay on."""
    if not getattr(model, "_supports_gradient_checkpointing", False) or model.is_gradient_checkpointing:
        yield
        return
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


def _needs_float32(model: Any) -> bool:
    return bool(model.config.get("force_upcast")) and model.dtype == torch.float16


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Keep an autoencoder that overflows in float16 in float32 while the block runs.

    Pipelines cast it only for the call of `decode`, but the backward pass comes later.
    """
    if not _needs_float32(model):
        yield
        return
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, data in before:
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def _as_float32(leaf: Any, model: nn.Module) -> Any:
    """`leaf` in float32 if it is a float16 tensor for an autoencoder in float32, else as it is."""
    dtype = next(model.parameters()).dtype
    half = isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float16
    return leaf.float() if half and dtype == torch.float32 and is_autoencoder(model) else leaf
