"""Scratch memory for CPU kernels: one buffer per thread, as large as the largest call so far."""

from __future__ import annotations

import threading
from math import prod

import torch


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self.views: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}


_buffers = _Buffers()


def scratch_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor in the scratch buffer. The thread's next call reuses the same memory."""
    view = _buffers.views.get((shape, dtype))
    if view is None:
        size = prod(shape) * dtype.itemsize
        if _buffers.bytes.numel() < size:
            release_scratch()
            _buffers.bytes = torch.empty(size, dtype=torch.uint8)
        view = _buffers.views[shape, dtype] = _buffers.bytes[:size].view(dtype).view(shape)
    return view


def scratch(size: int) -> torch.Tensor:
    """`size` bytes of the scratch buffer, u8."""
    return scratch_tensor((size,), torch.uint8)


def scratch_bytes() -> int:
    """The size of this thread's buffer."""
    return _buffers.bytes.numel()


def release_scratch() -> None:
    """Free this thread's buffer."""
    _buffers.__init__()  # type: ignore[misc]
