"""Checkpoint every call of the denoisers (Griewank and Walther 2000): memory holds the latents of a trajectory and the
activations of one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from bitpolicy.sensitivity.trajectory import Trajectories


@contextmanager
def replaced_forward(module: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While the block runs, `module.forward` is `wrap(module.forward)`."""
    original, own = module.forward, vars(module).get("forward")
    module.forward = wrap(original)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class CheckpointedCalls:
    """Checkpoints the denoisers' calls, and tells during the backward pass which step's call is being redone.

    Attributes:
        steps: scheduler steps at which a denoiser was called in the last forward pass.
        cut: those that no gradient gets back to: called under `no_grad`, or followed by a call on a detached sample.
    """

    def __init__(self, trajectories: Trajectories, on_step: Callable[[int], None]) -> None:
        self._trajectories, self._on_step = trajectories, on_step
        self.steps: set[int] = set()
        self.cut: set[int] = set()

    @contextmanager
    def installed(self, recompute_inside: bool) -> Iterator[None]:
        """Args:
        recompute_inside: also checkpoint inside the denoiser, block by block, where it can.
        """
        self.steps, self.cut = set(), set()
        with ExitStack() as stack:
            for denoiser in self._trajectories.denoisers:
                if recompute_inside:
                    stack.enter_context(_block_checkpoints(denoiser))
                stack.enter_context(replaced_forward(denoiser, self._checkpointed))
            yield

    def _checkpointed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            step = self._trajectories.steps
            leaves, arguments = pytree.tree_flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
            if not torch.is_grad_enabled():
                self.cut.add(step)
            elif self.steps - {step} and not any(leaves[i].requires_grad for i in places):
                self.cut.add(step - 1)
            self.steps.add(step)
            structure: list[Any] = []

            def run(_anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
                self._on_step(step)
                filled = list(leaves)
                for place, tensor in zip(places, tensors, strict=True):
                    filled[place] = tensor
                positional, named = pytree.tree_unflatten(filled, arguments)
                outputs, spec = pytree.tree_flatten(original(*positional, **named))
                structure[:] = [spec]
                return tuple(outputs)

            # the anchor requires grad, as nothing else does at the first step, where the graph would be lost without it
            anchor = torch.zeros((), requires_grad=True)
            tensors = [leaves[i] for i in places]
            outputs = checkpoint(run, anchor, *tensors, use_reentrant=True, preserve_rng_state=False)
            return pytree.tree_unflatten(list(outputs), structure[0])

        return forward


@contextmanager
def _block_checkpoints(denoiser: nn.Module) -> Iterator[None]:
    """diffusers' own checkpoints, one a block; those that were on stay on."""
    model: Any = denoiser
    if not getattr(model, "_supports_gradient_checkpointing", False) or model.is_gradient_checkpointing:
        yield
        return
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()
