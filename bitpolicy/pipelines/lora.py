"""LoRA files, merged into a pipeline when it is loaded.

Layers are then scored, rounded and corrected with the weights that the images are drawn with: W + scale B A.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError


def parsed(text: str) -> tuple[str, float]:
    """The file or hub id, and the scale: FILE, or FILE:SCALE.

    Raises:
        BitPolicyError: there is no name, or the scale is not a finite number.
    """
    name, colon, scale = text.rpartition(":")
    if not colon or "/" in scale or "\\" in scale:  # a path of its own, such as C:\style.safetensors
        name, scale = text, "1"
    try:
        number = float(scale)
    except ValueError:
        number = float("nan")
    if not name or not abs(number) < float("inf"):
        raise BitPolicyError(f"--lora {text}: write FILE or FILE:SCALE, e.g. style.safetensors:0.8")
    return name, number


def merge(pipe: DiffusionPipeline, loras: Sequence[str]) -> None:
    """Merge LoRA files into the pipeline's weights, in order.

    Args:
        loras: each FILE or FILE:SCALE; a file is .safetensors, or a folder or hub repository that holds one.

    Raises:
        BitPolicyError: a file is missing, is a pickle or does not fit, or this class of pipeline takes none.
    """
    for text in loras:
        name, scale = parsed(text)
        if not hasattr(pipe, "load_lora_weights"):
            raise BitPolicyError(f"{type(pipe).__name__} takes no LoRA; leave out --lora")
        path, before = Path(name), _sums(pipe)
        if path.is_file() and path.suffix != ".safetensors":
            raise BitPolicyError(f"--lora {name} is not a .safetensors file; convert it, as others may run code")
        if not path.exists() and (path.suffix or name.count("/") != 1):
            raise BitPolicyError(f"there is no --lora {name}; give a .safetensors file, a folder or a hub id")
        place = (str(path.parent), path.name) if path.is_file() else (name, None)
        try:
            pipe.load_lora_weights(place[0], weight_name=place[1], use_safetensors=True)
            pipe.fuse_lora(lora_scale=scale, safe_fusing=True)
            pipe.unload_lora_weights()
        except Exception as error:  # diffusers, peft and the file decide what is raised
            raise BitPolicyError(
                f"cannot merge --lora {name} into {type(pipe).__name__}: {' '.join(str(error).split())}"
            ) from error
        if _sums(pipe) == before:
            raise BitPolicyError(
                f"--lora {text} changes no weight of {type(pipe).__name__}; it is for another model, or its scale is 0"
            )


@torch.no_grad()
def _sums(pipe: DiffusionPipeline) -> list[float]:
    """A number for each matrix of each model, that changes with it."""
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    return [float(p.double().square().sum()) for model in models for p in model.parameters() if p.ndim > 1]
