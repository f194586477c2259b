"""Calls a pipeline for samples, with or without an autograd graph, and watches its loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline

from bitpolicy.policies.components import runs_in_loop
from bitpolicy.sensitivity.calls.form import Writing, arguments
from bitpolicy.sensitivity.calls.outputs import first, latent
from bitpolicy.sensitivity.calls.signature import STEPS, Signature
from bitpolicy.sensitivity.calls.watched_loop import WatchedLoop
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.decoding import Decoding, replaced_method

_SHORT = 2  # steps of a trial run, which only shows how the pipeline can be called
_SCHEDULES = ("timesteps", "sigmas")  # arguments that set the steps one by one


class Caller:
    """One pipeline, with the arguments of every call.

    Attributes:
        pipe: the pipeline.
        call: arguments of every call.
        signature: of the pipeline's call.
        loop: its scheduler steps, watched while the pipeline runs.
    """

    def __init__(self, pipe: DiffusionPipeline, call: Mapping[str, Any], decoding: Decoding | None = None) -> None:
        self.pipe, self.call, self.decoding = pipe, call, decoding
        self.signature, self.loop = Signature.of(pipe), WatchedLoop(pipe)

    def run(self, samples: Sequence[Sample], writing: Writing, asked: Mapping[str, Any], leave_after: int = 0) -> Any:
        """The first output of the pipeline for `samples`, without a graph.

        Args:
            asked: arguments that select the output.
            leave_after: raise `Finished` after this many steps of the loop; 0 means never.

        Raises:
            Finished: the loop was left after `leave_after` steps.
            NotFinite: a step gave NaN or Inf.
        """
        given = arguments(self.pipe, self.signature, self.call, samples, writing)
        with self._watched(samples[0].seed, leave_after), torch.no_grad():
            return self._selected(self.pipe(**given, **asked), asked)

    def run_with_graph(
        self, sample: Sample, writing: Writing, asked: Mapping[str, Any], leave_after: int, decodes: int
    ) -> Any:
        """The same with a graph. It calls the function that diffusers decorates with `torch.no_grad`.

        Args:
            decodes: raise `Decoded` after this many calls of the autoencoder's `decode`; 0 means never.
        """
        given = arguments(self.pipe, self.signature, self.call, [sample], writing)
        undecorated: Callable[..., Any] = inspect.unwrap(type(self.pipe).__call__)
        _complete(self.pipe)
        with self._undecorated_inside(), self._watched(sample.seed, leave_after, decodes), torch.enable_grad():
            return self._selected(undecorated(self.pipe, **given, **asked), asked)

    def trial(
        self, samples: Sequence[Sample], writing: Writing, asked: Mapping[str, Any], *, whole: bool = False
    ) -> Any:
        """Like `run`, but NaN and Inf pass, and there are only two steps if they can be set, unless `whole`."""
        given = arguments(self.pipe, self.signature, self.call, samples, writing)
        if not whole:
            given |= self._short(given)
        with self.loop.watched(samples[0].seed, finite=False), torch.no_grad():
            return self._selected(self.pipe(**given, **asked), asked)

    @staticmethod
    def _selected(output: Any, asked: Mapping[str, Any]) -> Any:
        return latent(output) if asked.get("output_type") == "latent" else first(output)

    def _short(self, given: Mapping[str, Any]) -> dict[str, Any]:
        steps = given.get(STEPS, self.signature.defaults.get(STEPS))
        shorter = isinstance(steps, int) and steps > _SHORT and not any(given.get(name) for name in _SCHEDULES)
        return {STEPS: _SHORT} if shorter and STEPS in self.signature else {}

    @contextmanager
    def _undecorated_inside(self) -> Iterator[None]:
        """While the block runs, pipelines that this one is made of let gradients pass, too."""
        inside = {type(part) for part in vars(self.pipe).values() if isinstance(part, DiffusionPipeline)}
        with ExitStack() as stack:
            for kind in inside:
                stack.enter_context(replaced_method(kind, "__call__", inspect.unwrap))
            yield

    @contextmanager
    def _watched(self, seed: int, leave_after: int, decodes: int = 0) -> Iterator[None]:
        watched = nullcontext() if self.decoding is None else self.decoding.watched(decodes)
        with watched, self.loop.watched(seed, leave_after):
            yield


def _complete(pipe: DiffusionPipeline) -> None:
    """Give models in the loop the switch that their forward looks at when there is a graph. Z-Image's ControlNet has
    none."""
    for model in pipe.components.values():
        if runs_in_loop(model) and not hasattr(model, "gradient_checkpointing"):
            model.gradient_checkpointing = False
