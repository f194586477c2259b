"""Reads the output of a pipeline as one tensor per sample.

Pipelines return images, videos or sound as tensors, arrays, PIL images or lists of these, with channels first or last.
Some return several results per sample. Here, an image has shape (C, H, W), a video (frames, C, H, W), and sound
(samples) or (channels, samples).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from bitpolicy.kernels.errors import BitPolicyError

_WHITE = {torch.uint8: 255, torch.uint16: 65535, torch.int32: 65535}  # PIL stores 16-bit images in 32 bits
_SLACK = 1e-3  # how far outside [0, 1] the values of an unrounded image may be


def first(output: Any) -> Any:
    """The main part of a pipeline's output: images, frames, sound or latents."""
    return output[0] if isinstance(output, BaseOutput | tuple) else output


def latent(output: Any) -> Any:
    """The latents in a pipeline's output. Those of a video and of its sound track become one, and each counts the same
    whatever its size: both are divided by the square root of the number of values."""
    main, sound = first(output), getattr(output, "audio", None)
    if not isinstance(main, torch.Tensor) or not isinstance(sound, torch.Tensor) or len(main) != len(sound):
        return main
    return torch.cat([part.flatten(1) / part[0].numel() ** 0.5 for part in (main, sound)], 1)


def rows(found: torch.Tensor, count: int) -> torch.Tensor:
    """`found` with one row for each of `count` samples.

    Raises:
        BitPolicyError: its rows cannot be divided evenly among the samples.
    """
    if len(found) == count:
        return found
    if len(found) == 2 * count and torch.equal(found[:count], found[count:]):
        return found[:count]  # DiT holds every sample twice, for guidance
    if not len(found) or len(found) % count:
        raise BitPolicyError(
            f"the pipeline was given {count} samples and returned {len(found)} results; "
            "it has to return the same number of results for each sample"
        )
    return found.unflatten(0, (count, -1))  # frames in the batch (video U-Nets), or several images per sample


def drawn(output: Any, count: int) -> list[torch.Tensor]:
    """The finished images, videos or sounds of `count` samples, float32 on the CPU; images and videos in [0, 1]."""
    found = _tensor(output)
    return list(rows(found.float().cpu() / _WHITE.get(found.dtype, 1), count))


def is_sound(one: torch.Tensor) -> bool:
    """Whether the result of one sample is sound, shape (samples) or (channels, samples)."""
    return one.dim() < 3


def in_range(one: torch.Tensor) -> bool:
    """Whether the result of one sample is sound, or has all its values in [0, 1]."""
    return is_sound(one) or bool((one >= -_SLACK).all() and (one <= 1 + _SLACK).all())


def _tensor(output: Any) -> torch.Tensor:
    """The output as one tensor, with channels before height and width."""
    if isinstance(output, Image.Image):
        output = np.asarray(output)
        return torch.from_numpy(output[None] if output.ndim == 2 else np.moveaxis(output, -1, 0)).contiguous()
    if isinstance(output, Sequence) and not isinstance(output, str | bytes):
        return torch.stack([_of_one(part) for part in output])
    if isinstance(output, np.ndarray):
        found = torch.from_numpy(np.ascontiguousarray(output))
        return found if output.ndim < 4 else found.movedim(-1, -3)
    if isinstance(output, torch.Tensor):
        return output
    raise BitPolicyError(f"the pipeline returned {type(output).__name__}; it has to return images, videos or sound")


def _of_one(part: Any) -> torch.Tensor:
    """One entry of a list as a tensor. An array with three axes is an image with channels last."""
    if isinstance(part, np.ndarray) and part.ndim == 3:
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(part, -1, 0)))
    return _tensor(part)
