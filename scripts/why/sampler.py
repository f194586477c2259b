"""What iteration does to an error: which errors of the latent remain, and what steps and guidance change.

`forgetting` adds an error of 0.1% of the latent's size after one sampling step, and measures the finished latent: a
gain below 1 means that the sampler forgets the error, above 1 that it amplifies it.

`iteration` draws with all layers in INT4 or INT8 at other numbers of steps and with other guidance. It measures the
error of the finished latent, against the unquantized model at the same setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from why.subjects import Subject, decibels, relative

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.policies.apply import quantized
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

SMALL = 1e-3
SAMPLES = 8
QUANTIZED = (("int4", False), ("int4", True), ("int8", False))
"""(format, whether biases are corrected)"""


def forgetting(subject: Subject) -> dict[str, float]:
    """Gain of a relative error made after the first step, a quarter, half and three quarters of the steps, and after
    the last step but one."""
    samples = subject.samples[:SAMPLES]
    call = subject.plan.trajectories.call
    clean = _latents(subject, call, samples)
    last = call["num_inference_steps"] - 1
    places = {"first": 0, "1/4": last // 4, "1/2": last // 2, "3/4": 3 * last // 4, "last but one": last - 1}
    found = {}
    for name, step in places.items():
        with _nudged(subject.plan.source.pipe.scheduler, step):
            found[name] = relative(_latents(subject, call, samples), clean) ** 0.5 / SMALL
    return found


@contextmanager
def _nudged(scheduler: Any, at: int) -> Iterator[None]:
    """Add the error to what the scheduler returns at step `at` of each call."""
    plain, seen = scheduler.step, {"step": 0}
    set_timesteps = scheduler.set_timesteps

    def restarted(*args: Any, **kwargs: Any) -> Any:
        seen["step"] = 0
        return set_timesteps(*args, **kwargs)

    @wraps(plain)  # pipelines look at its signature
    def step(*args: Any, **kwargs: Any) -> Any:
        given = plain(*args, **kwargs)
        if seen["step"] == at:
            x = given[0] if isinstance(given, tuple) else given.prev_sample
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(at))
            dims = tuple(range(1, x.ndim))
            size = x.square().sum(dims, keepdim=True).sqrt() / z.square().sum(dims, keepdim=True).sqrt()
            x.add_(SMALL * size * z)
        seen["step"] += 1
        return given

    scheduler.step, scheduler.set_timesteps = step, restarted
    try:
        yield
    finally:
        del scheduler.step, scheduler.set_timesteps


def iteration(subject: Subject) -> Iterator[dict[str, Any]]:
    """Rows of settings: the error of the finished latents, in dB below the signal."""
    samples, usual = subject.samples[:SAMPLES], subject.plan.trajectories.call
    steps = (1, 2, 4, 8) if usual["num_inference_steps"] < 10 else (5, 10, 20, 40)
    settings: list[Mapping[str, Any]] = [{"num_inference_steps": count} for count in steps]
    if usual["guidance_scale"] > 1:
        settings += [{"guidance_scale": scale} for scale in (1.0, usual["guidance_scale"])]
    for setting in settings:
        call = {**usual, **setting}
        clean = _latents(subject, call, samples)
        row: dict[str, Any] = {"steps": call["num_inference_steps"], "guidance": call["guidance_scale"]}
        for name, corrected in QUANTIZED:
            choices = subject.uniform(format_named(name), corrected)
            with quantized(subject.denoiser, choices, quantization=subject.quantization):
                error = relative(_latents(subject, call, samples), clean)
            row[f"{name}, corrected" if corrected else name] = decibels(error)
        yield row


def _latents(subject: Subject, call: Mapping[str, Any], samples: Sequence[Sample]) -> torch.Tensor:
    source = subject.plan.source
    return torch.stack(list(Trajectories(source.pipe, source.components, call).latents(samples)))
