"""The memory format of torch's convolution results: channels last if the input is, else contiguous.

The rule is `suggest_memory_format` in torch's c10/core/TensorImpl.h. It depends only on the strides.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul

import torch

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def in_channels_last(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether torch treats an input of shape (B, C, *spatial) as channels last."""
    if len(shape) - 2 not in CHANNELS_LAST or not strides[1] or 0 in shape:
        return False
    least = 0
    for i in (1, *range(len(shape) - 1, 1, -1), 0):
        if strides[i] < least or (i == 0 and least == strides[1]):  # the latter is ambiguous
            return False
        least = strides[i] * max(shape[i], 1)
    return True


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate((max(n, 1) for n in shape[:0:-1]), mul, initial=1))[::-1]


def channels_last_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    samples, channels, *size = shape
    batch, *spatial, one = contiguous_strides((samples, *size, channels))
    return (batch, one, *spatial)
