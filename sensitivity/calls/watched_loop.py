"""Watches the sampling loop of a running pipeline through its schedulers: counts steps and keeps the last sample."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline


class Finished(BaseException):
    """Leaves a sampling loop after its last step."""


class NotFinite(Exception):
    """A scheduler step gave NaN or Inf."""


class WatchedLoop:
    """Watches the schedulers of one pipeline.

    Attributes:
        steps: scheduler steps of the last run, or of the current run so far.
        last: the sample from the last step, with its graph if it has one; empty before the first step.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._pipe = pipe
        self._leave_after, self._finite = 0, True
        self.steps, self.last = 0, torch.empty(0)

    def forget(self) -> None:
        """Drop the last sample, which would keep its graph alive."""
        self.last = torch.empty(0)

    @contextmanager
    def watched(self, seed: int, leave_after: int = 0, finite: bool = True) -> Iterator[None]:
        """Watch the schedulers while the block runs, then restore their state.

        A scheduler's history would otherwise keep the graph of a whole trajectory alive.

        Args:
            seed: of random numbers that the pipeline does not take from its generator.
            leave_after: raise `Finished` after this many steps; 0 means never.
            finite: raise `NotFinite` if a step gives NaN or Inf.
        """
        found = schedulers(self._pipe)
        before = [(scheduler, dict(vars(scheduler))) for scheduler in found]
        self.steps, self.last, self._leave_after, self._finite = 0, torch.empty(0), leave_after, finite
        for scheduler in found:
            scheduler.step = _WatchedStep(scheduler.step, self._stepped)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                yield
        finally:
            for scheduler, state in before:
                vars(scheduler).clear()
                vars(scheduler).update(state)

    def _stepped(self, result: Any) -> None:
        self.steps += 1
        self.last = result if isinstance(result, torch.Tensor) else result[0]
        if self._finite and not torch.isfinite(self.last).all():
            raise NotFinite
        if self.steps == self._leave_after:
            raise Finished


def schedulers(pipe: DiffusionPipeline) -> list[Any]:
    """The components that take sampling steps: the scheduler and, in pipelines with several stages, the others."""
    own = getattr(pipe, "scheduler", None)
    others = (part for part in pipe.components.values() if part is not own and hasattr(part, "set_timesteps"))
    return [part for part in (own, *others) if callable(getattr(part, "step", None))]


class _WatchedStep:
    """A scheduler's `step` that also reports its result.

    A copy of the scheduler, as pipelines make for a sound track, gets the original `step` back.
    """

    def __init__(self, original: Callable[..., Any], report: Callable[[Any], None]) -> None:
        self._original, self._report = original, report
        functools.update_wrapper(self, original)  # pipelines look at its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._original(*args, **kwargs)
        self._report(result)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self._original, memo)
