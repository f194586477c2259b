"""What a toy is: a tiny pipeline with random weights, new at each call, and the arguments that run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

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
        image_type: output type of finished images: "pt", or "np" where the pipeline does not give tensors.
        refused: words of the error with which bitpolicy refuses this class; empty for one that works.
    """

    name: str
    new: Callable[[], DiffusionPipeline]
    call: dict[str, Any]
    takes: Literal["prompt", "class_labels", "nothing"] = "prompt"
    extra: dict[str, Any] = field(default_factory=dict)
    gives_latents: bool = True
    image_type: str = "pt"
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


@torch.no_grad()
def _wake(module: nn.Module) -> None:
    """Give random values to every weight and bias that starts at zero and would hide the layers around it."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=_WOKEN)


def picture(size: int = 16) -> Image.Image:
    """Two colours that run into each other, shape (size, size)."""
    ramp = Image.linear_gradient("L").resize((size, size))
    return Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))


def mask(size: int = 16) -> Image.Image:
    """Black, which stays, and white in the right half, which is painted, shape (size, size)."""
    found = Image.new("L", (size, size))
    found.paste(255, (size // 2, 0, size, size))
    return found
