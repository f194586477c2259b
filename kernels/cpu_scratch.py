"""Memory that CPU kernels write into and forget: one buffer for each thread, as large as the largest call so far."""

from __future__ import annotations

import threading
from math import prod

import torch


class _Buffers(threading.local):
    bytes: torch.Tensor | None = None


_buffers = _Buffers()


def scratch(size: int) -> torch.Tensor:
    """`size` bytes, u8, that the next call of this thread hands out again."""
    held = _buffers.bytes
    if held is None or held.numel() < size:
        held = _buffers.bytes = torch.empty(size, dtype=torch.uint8)
    return held[:size]


def scratch_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor in `scratch`."""
    return scratch(prod(shape) * dtype.itemsize).view(dtype).view(shape)


def scratch_bytes() -> int:
    """Bytes that this thread holds."""
    return 0 if _buffers.bytes is None else _buffers.bytes.numel()


def release_scratch() -> None:
    """Give this thread's buffer back."""
    _buffers.bytes = None
