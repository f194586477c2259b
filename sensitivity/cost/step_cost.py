"""Measures the time of one sampling step: runs a few steps, times them and leaves the loop.

A run is a number of such steps, with or without gradients, so its time can be predicted before it begins.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from bitpolicy.policies.footprint import most_allocated
from bitpolicy.sensitivity.calls.watched_loop import schedulers
from bitpolicy.sensitivity.probes.stepwise import LocalSketches
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.decoding import replaced_method
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

_TIMED = 2  # steps: the first one also encodes the prompt and fills caches


class _Enough(BaseException):
    """Leaves a sampling loop once enough steps are timed."""


@dataclass(frozen=True)
class Timing:
    """The time of the first steps of one pipeline call.

    Attributes:
        first: seconds until the first step is done, including the prompt and other preparation.
        step: seconds of each later step; equal to `first` if there is only one step.
        steps: scheduler steps of the whole loop.
    """

    first: float
    step: float
    steps: int

    @property
    def trajectory(self) -> float:
        """Seconds of the whole loop."""
        return self.first + (self.steps - 1) * self.step


def time_plain(trajectories: Trajectories, samples: Sequence[Sample]) -> Timing:
    """The time of a pipeline call without gradients.

    Args:
        samples: for this call; at most `trajectories.batch`.

    Raises:
        BitPolicyError: the pipeline refuses the call, or a step gives NaN or Inf.
    """
    trajectories.learn(samples[0])
    return _timed(trajectories, lambda: next(trajectories.latents(samples)))


def time_probed(trajectories: Trajectories, probe: LocalSketches, sample: Sample) -> Timing:
    """The time of a pipeline call that differentiates each denoiser call, for one sketch, without what ends it."""
    trajectories.learn(sample)
    return _timed(trajectories, lambda: probe.first_steps(sample, _TIMED))


def peak_of_step(trajectories: Trajectories, run: Callable[[], object]) -> int:
    """The peak bytes that `run` allocates until its first step is done, in addition to what is allocated before.

    Args:
        run: calls the pipeline. `trajectories.learn` has to be called before.

    Raises:
        BitPolicyError: the pipeline is neither on the CPU nor on CUDA.
    """

    def first_step() -> None:
        with _leaving_after(trajectories, 1):
            run()

    return most_allocated(trajectories.target.device, first_step)


def _timed(trajectories: Trajectories, run: Callable[[], object]) -> Timing:
    start = time.perf_counter()
    with _leaving_after(trajectories, _TIMED) as watch:
        run()
    if not watch.times:  # the loop takes no scheduler steps, so all of it was timed
        whole = time.perf_counter() - start
        return Timing(whole, whole, 1)
    first, last = watch.times[0] - start, watch.times[-1] - watch.times[-2] if len(watch.times) > 1 else 0.0
    return Timing(first, last or first, watch.steps)


@dataclass
class _Watch:
    """When each step was done, how many steps the whole loop has, and whether all samples were finite."""

    times: list[float]
    steps: int = 1
    finite: bool = True


@contextmanager
def _leaving_after(trajectories: Trajectories, count: int) -> Iterator[_Watch]:
    """While the block runs, a sampling loop ends after `count` steps.

    Steps before the first call of a denoiser are those of another loop, such as a prior's, and do not count.
    """
    device = trajectories.target.device
    watch = _Watch([])
    begun: list[bool] = []

    def begin(*_: Any) -> None:
        begun[:] = [True]

    def step_of(scheduler: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if not begun:
                return result
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            watch.times.append(time.perf_counter())
            timesteps = getattr(scheduler, "timesteps", None)
            watch.steps = max(len(watch.times), 0 if timesteps is None else len(timesteps))
            watch.finite &= bool(torch.isfinite(result[0]).all())
            if len(watch.times) == count and watch.finite:  # otherwise the caller reports NaN or Inf
                raise _Enough
            return result

        return step

    with ExitStack() as stack:
        for denoiser in trajectories.denoisers:
            stack.enter_context(denoiser.register_forward_pre_hook(begin))
        for scheduler in schedulers(trajectories.pipe):
            stack.enter_context(replaced_method(scheduler, "step", functools.partial(step_of, scheduler)))
        stack.enter_context(suppress(_Enough))
        yield watch
