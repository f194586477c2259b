"""What a toy is: a tiny pipeline with random weights, new at each call, and the arguments that run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

_SEED = 20
_WOKEN = 0.1  # standard deviation of what a model starts at zero


@dataclass(frozen=True)
class Toy:
    """One pipeline class at toy size.

    Attributes:
        name: of the pipeline class, with a suffix where a class comes in two forms.
        new: makes the pipeline: float32, in eval mode, the same weights at every call.
        call: arguments of `pipe(...)` that make it fast and valid; no prompt, generator or output type.
        takes: what a sample has to name: a prompt, a class label, or nothing.
        extra: arguments of one sample beyond that, e.g. the image that Stable Video Diffusion animates.
        gives_latents: whether it takes output_type="latent"; some that take it give images all the same.
        finished: the output type that gives finished results.
        budget: of the searches: small enough that layers without effect, which go first, are not all that is quantized.
        refused: words of the error with which bitpolicy refuses this class; empty for one that works.
    """

    name: str
    new: Callable[[], DiffusionPipeline]
    call: dict[str, Any]
    takes: Literal["prompt", "class_labels", "nothing"] = "prompt"
    extra: dict[str, Any] = field(default_factory=dict)
    gives_latents: bool = True
    finished: str = "pt"
    budget: str = "80%"
    refused: str = ""


def reproducible(build: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """`build` with the same random weights at every call, none of them zero, and no progress bar.

    The random state outside is left as it was.
    """

    def new() -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            try:
                pipe = build()
            except RuntimeError as error:  # diffusers 0.36 has one that transformers 5 took a tokenizer from
                if "Failed to import diffusers.pipelines" not in str(error):
                    raise
                pytest.skip(str(error).splitlines()[0])
            modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
            for module in modules:
                _wake(module.eval())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return new


def toy_of(name: str, parts: Callable[[], dict[str, Any]], call: dict[str, Any], **options: Any) -> Toy:
    """The toy of a pipeline class, made of `parts()`.

    Args:
        name: of the class, with a suffix after "-" where a class comes in two forms.
        options: further fields of `Toy`.
    """
    kind = getattr(diffusers, name.partition("-")[0])
    return Toy(name, reproducible(lambda: kind(**parts())), call, **options)


@torch.no_grad()
def _wake(module: nn.Module) -> None:
    """Give random values to every weight and bias that starts at zero and would hide the layers around it, or that
    starts as whatever the memory held, as Z-Image's tokens for padding do."""
    for name, parameter in module.named_parameters():
        if not parameter.any() or name.endswith("pad_token"):
            parameter.normal_(std=_WOKEN)


def clip(frames: int = 5, size: int = 16) -> list[Image.Image]:
    """The picture, turned a little further in every frame."""
    return [picture(size).rotate(20 * i) for i in range(frames)]


def picture(size: int = 16) -> Image.Image:
    """Two colours that run into each other, shape (size, size)."""
    ramp = Image.linear_gradient("L").resize((size, size))
    return Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))


def mask(size: int = 16) -> Image.Image:
    """Black, which stays, and white in the right half, which is painted, shape (size, size)."""
    found = Image.new("L", (size, size))
    found.paste(255, (size // 2, 0, size, size))
    return found


IMAGE, MASK, CONTROL = {"image": picture()}, {"mask_image": mask()}, {"control_image": picture()}
PART: dict[str, Any] = {"strength": 0.7, "num_inference_steps": 5}  # of the schedule, which leaves three steps
