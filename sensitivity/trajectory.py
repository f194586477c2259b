"""Run a pipeline's own sampling loop: finished images, final latents, or a differentiable latent.

No sampler code is needed: `type(pipe).__call__` is the loop, with whatever scheduler the pipeline has, and the function
that diffusers' `torch.no_grad` decorator wraps is differentiable end to end.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError

_OURS = ("prompt", "generator", "output_type", "num_images_per_prompt", "return_dict", "latents")
DENOISERS = ("unet", "transformer")
_SMALL, _SMALL_BATCH = 100_000_000, 4  # parameters below which several samples share one call, and how many


@dataclass(frozen=True)
class Sample:
    """One prompt with one seed: a trajectory."""

    prompt: str
    seed: int


def denoiser_name(pipe: DiffusionPipeline, component: str | None = None) -> str:
    """The component to quantize: `component` if given, else the pipeline's `unet` or `transformer`.

    Raises:
        BitPolicyError: the pipeline has no such component, or it is not a torch module.
    """
    candidates = [component] if component else DENOISERS
    for name in candidates:
        found = getattr(pipe, name, None)
        if isinstance(found, ModelMixin) and not hasattr(found, "decode"):  # an autoencoder is not in the loop
            return name
    if component and isinstance(getattr(pipe, component, None), nn.Module):
        raise BitPolicyError(f"the {component} of {type(pipe).__name__} is no denoiser; leave --component out")
    modules = [name for name, value in pipe.components.items() if isinstance(value, nn.Module)]
    wanted = f"component {component!r}" if component else f"component named {' or '.join(DENOISERS)}"
    raise BitPolicyError(
        f"{type(pipe).__name__} has no {wanted}; it has {', '.join(modules) or 'none'}: choose with --component"
    )


class Trajectories:
    """The sampling loop of one pipeline with fixed call arguments.

    Attributes:
        pipe: the pipeline; its denoiser may be changed between runs, and the change shows.
        denoiser: the module under study.
        call: arguments of every pipeline call, e.g. {"num_inference_steps": 20}.
        steps: number of scheduler steps of the last run.
        batch: how many samples share one call where no gradient is wanted.
    """

    def __init__(self, pipe: DiffusionPipeline, component: str, call: Mapping[str, Any]) -> None:
        self.pipe, self.call = pipe, dict(call)
        self.denoiser: nn.Module = getattr(pipe, component)
        self._accepted = inspect.signature(type(pipe).__call__).parameters
        unknown = [name for name in self.call if name not in self._accepted]
        if unknown:
            raise BitPolicyError(f"{type(pipe).__name__} does not take {', '.join(unknown)}; leave it out")
        ours = [name for name in self.call if name in _OURS]
        if ours:
            raise BitPolicyError(f"{', '.join(ours)} cannot be given: every sample sets its own; leave it out")
        self.steps = 0
        self._last = torch.empty(0)
        self.batch = _SMALL_BATCH if sum(p.numel() for p in self.denoiser.parameters()) < _SMALL else 1
        pipe.set_progress_bar_config(disable=True)

    def images(self, samples: Iterable[Sample]) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """(decoded image, final latent) of each sample without gradients; `batch` samples share one pipeline call.

        Yields:
            image float32 on the CPU, shape (C, H, W), in [0, 1], not rounded to 8 bits; latent float32 on the CPU,
            shape (C, h, w), scaled as the denoiser sees it.
        """
        for part in _parts(samples, self.batch):
            with self._observed(), torch.no_grad():
                output = self.pipe(**self._arguments(part), output_type="pt")
            yield from zip(_first(output).float().cpu(), self._last.float().cpu(), strict=True)

    def latents(self, samples: Iterable[Sample]) -> Generator[torch.Tensor, None, None]:
        """The final latent of each sample without gradients, float32 on the CPU, shape (C, h, w)."""
        for part in _parts(samples, self.batch):
            with self._observed(), torch.no_grad():
                self.pipe(**self._arguments(part), output_type="latent")
            yield from self._last.float().cpu()

    def differentiable_latent(self, sample: Sample) -> torch.Tensor:
        """The final latent with its graph, shape (1, C, h, w), in the compute dtype.

        Raises:
            BitPolicyError: the pipeline's loop cannot be differentiated.
        """
        undecorated: Callable[..., Any] = inspect.unwrap(type(self.pipe).__call__)
        with self._observed(), torch.enable_grad():
            latent = _first(undecorated(self.pipe, **self._arguments([sample]), output_type="latent"))
        if not latent.requires_grad:
            raise BitPolicyError(
                f"the sampling loop of {type(self.pipe).__name__} cannot be differentiated; use --probe ablation"
            )
        return latent

    def _arguments(self, samples: Sequence[Sample]) -> dict[str, Any]:
        arguments = {
            name: [value] * len(samples) if isinstance(value, str) and "prompt" in name else value
            for name, value in self.call.items()
        }
        arguments["generator"] = [torch.Generator("cpu").manual_seed(sample.seed) for sample in samples]
        if "prompt" in self._accepted:
            arguments["prompt"] = [sample.prompt for sample in samples]
        elif "class_labels" in self._accepted:
            arguments["class_labels"] = [int(sample.prompt) for sample in samples]
        return arguments

    @contextmanager
    def _observed(self) -> Iterator[None]:
        """Count the scheduler's steps and remember the sample that the last one made."""
        scheduler: Any = self.pipe.scheduler
        original, own = scheduler.step, vars(scheduler).get("step")
        self.steps = 0

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.steps += 1
            self._last = result[0].detach()
            return result

        scheduler.step = step
        try:
            yield
        finally:
            if own is None:
                del scheduler.step
            else:
                scheduler.step = own


def _parts(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    waiting = iter(samples)
    while part := list(itertools.islice(waiting, size)):
        yield part


def _first(output: Any) -> torch.Tensor:
    """The images, frames or latents of a pipeline's output."""
    return output[0]


def split_samples(prompts: Sequence[str], count: int, seed: int) -> list[Sample]:
    """`count` samples that go through `prompts` in turn, each with a seed of its own from `seed` upwards."""
    return [Sample(prompts[i % len(prompts)], seed + i) for i in range(count)]
