"""Run a pipeline's own sampling loop for one sample: its finished image, its final latent, or a differentiable latent.

No sampler code is needed: `type(pipe).__call__` is the loop, with whatever scheduler the pipeline has, and the function
that diffusers' `torch.no_grad` decorator wraps is differentiable end to end.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError

DENOISERS = ("unet", "transformer")


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
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
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
    """

    def __init__(self, pipe: DiffusionPipeline, component: str, call: Mapping[str, Any]) -> None:
        self.pipe, self.call = pipe, dict(call)
        self.denoiser: nn.Module = getattr(pipe, component)
        self._accepted = inspect.signature(type(pipe).__call__).parameters
        unknown = [name for name in self.call if name not in self._accepted]
        if unknown:
            raise BitPolicyError(f"{type(pipe).__name__} does not take {', '.join(unknown)}; leave it out")
        self.steps = 0
        pipe.set_progress_bar_config(disable=True)

    def image(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        """(decoded image, final latent) without gradients.

        Returns:
            image float32 on the CPU, shape (C, H, W), in [0, 1], not rounded to 8 bits; latent float32 on the CPU,
            shape (C, h, w), scaled as the denoiser sees it.
        """
        last: list[torch.Tensor] = []
        with self._observed(last.append), torch.no_grad():
            output = self.pipe(**self._arguments(sample), output_type="pt")
        return _first(output)[0].float().cpu(), last[-1][0].float().cpu()

    def latent(self, sample: Sample) -> torch.Tensor:
        """The final latent without gradients, float32 on the CPU, shape (C, h, w)."""
        with self._observed(lambda _: None), torch.no_grad():
            return _first(self.pipe(**self._arguments(sample), output_type="latent"))[0].float().cpu()

    def differentiable_latent(self, sample: Sample) -> torch.Tensor:
        """The final latent with its graph, shape (1, C, h, w), in the compute dtype.

        Raises:
            BitPolicyError: the pipeline's loop cannot be differentiated.
        """
        undecorated: Callable[..., Any] = inspect.unwrap(type(self.pipe).__call__)
        with self._observed(lambda _: None), torch.enable_grad():
            latent = _first(undecorated(self.pipe, **self._arguments(sample), output_type="latent"))
        if not latent.requires_grad:
            raise BitPolicyError(
                f"the sampling loop of {type(self.pipe).__name__} cannot be differentiated; use --probe ablation"
            )
        return latent

    def _arguments(self, sample: Sample) -> dict[str, Any]:
        arguments = dict(self.call)
        arguments["generator"] = torch.Generator("cpu").manual_seed(sample.seed)
        if "prompt" in self._accepted:
            arguments["prompt"] = sample.prompt
        elif "class_labels" in self._accepted:
            arguments["class_labels"] = [int(sample.prompt)]
        return arguments

    @contextmanager
    def _observed(self, look: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Count the scheduler's steps and show each new sample to `look`."""
        scheduler: Any = self.pipe.scheduler
        original = scheduler.step
        self.steps = 0

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.steps += 1
            look(result[0].detach() if isinstance(result, tuple) else result.prev_sample.detach())
            return result

        scheduler.step = step
        try:
            yield
        finally:
            del scheduler.step


def _first(output: Any) -> torch.Tensor:
    """The images, frames or latents of a pipeline's output."""
    return output[0]


def split_samples(prompts: Sequence[str], count: int, seed: int) -> list[Sample]:
    """`count` samples that go through `prompts` in turn, each with a seed of its own from `seed` upwards."""
    return [Sample(prompts[i % len(prompts)], seed + i) for i in range(count)]
