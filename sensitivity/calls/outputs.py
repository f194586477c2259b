"""What comes out of a pipeline, as one tensor for each sample.

Pipelines give images, videos or sound as tensors, arrays, pictures or lists of these, channels first or last, and some
give several for one sample. Here an image is (C, H, W), a video (frames, C, H, W), sound (samples) or (channels,
samples).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from bitpolicy.kernels.errors import BitPolicyError

_WHITE = {torch.uint8: 255, torch.uint16: 65535, torch.int32: 65535}  # PIL has 16 bits in 32
_SLACK = 1e-3  # beyond [0, 1], of an image that is not rounded


def first(output: Any) -> Any:
    """The images, frames, sound or latents of a pipeline's output, which may hold more beside them."""
    return output[0] if isinstance(output, BaseOutput | tuple) else output


def rows(found: torch.Tensor, count: int) -> torch.Tensor:
    """`found` with one row for each of `count` samples.

    Raises:
        BitPolicyError: it cannot be shared out among them.
    """
    if len(found) == count:
        return found
    if len(found) == 2 * count and torch.equal(found[:count], found[count:]):
        return found[:count]  # DiT carries every sample twice, for guidance
    if not len(found) or len(found) % count:
        raise BitPolicyError(f"the pipeline was given {count} samples and gave {len(found)} results")
    return found.unflatten(0, (count, -1))  # video U-Nets: frames in the batch; or several images of a sample


def drawn(output: Any, count: int) -> list[torch.Tensor]:
    """The finished images, videos or sounds of `count` samples, float32 on the CPU; pictures in [0, 1]."""
    found = _tensor(output)
    return list(rows(found.float().cpu() / _WHITE.get(found.dtype, 1), count))


def is_sound(one: torch.Tensor) -> bool:
    """Whether what one sample gives is a sound, shape (samples) or (channels, samples)."""
    return one.dim() < 3


def in_range(one: torch.Tensor) -> bool:
    """Whether it is a sound, or a picture in [0, 1]."""
    return is_sound(one) or bool((one >= -_SLACK).all() and (one <= 1 + _SLACK).all())


def _tensor(output: Any) -> torch.Tensor:
    """Channels before height and width."""
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
    raise BitPolicyError(f"the pipeline gives {type(output).__name__}; needed are images, videos or sound")


def _of_one(part: Any) -> torch.Tensor:
    """One entry of a list; an array of three axes is an image, channels last."""
    if isinstance(part, np.ndarray) and part.ndim == 3:
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(part, -1, 0)))
    return _tensor(part)
