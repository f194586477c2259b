"""A weight is quantized a few rows at a time: rows are independent, so the bits are the same, and what is computed on
the way stays in the processor's cache and takes a few megabytes, however large the layer is.

Chunks are spread over threads, each of which computes alone. Letting torch split every operation instead makes threads
wait for each other some twenty times a chunk, which on a busy machine is ten times as slow as one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod

import torch

from bitpolicy.kernels.formats.format import Format, Shape

_CHUNK = 2**20  # weights at a time; a quarter or four times of it is slower


def each_chunk(work: Callable[[slice], None], shape: Shape, device: torch.device) -> None:
    """Call `work` for all rows of a weight, some at a time and on the CPU several at once.

    Args:
        work: gets a slice of rows, and touches nothing that belongs to others.
        shape: of the weight, (out, in/groups, *kernel).
    """
    rows = max(1, _CHUNK // max(1, prod(shape[1:])))
    chunks = [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]
    threads = min(torch.get_num_threads(), len(chunks)) if device.type == "cpu" else 1
    with _single_threaded():
        if threads <= 1:
            for chunk in chunks:
                work(chunk)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, chunks))  # raises what `work` raised


@contextmanager
def _single_threaded() -> Iterator[None]:
    """While the block runs, threads that are begun in it compute alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quantize_in_chunks(
    format: Format, quantize: Callable[[torch.Tensor], dict[str, torch.Tensor]], weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What `quantize(weight)` gives, for a quantizer that treats each row by itself.

    Args:
        quantize: makes the stored tensors of `format`, whose first dimension is the weight's.
        weight: shape (out, in/groups, *kernel).
    """
    if weight.numel() <= _CHUNK:
        with _single_threaded():
            return quantize(weight)
    specs = format.tensors(weight.shape, weight.dtype)
    stored = {name: torch.empty(spec.shape, dtype=spec.dtype, device=weight.device) for name, spec in specs.items()}

    def work(rows: slice) -> None:
        for name, tensor in quantize(weight[rows]).items():
            stored[name][rows] = tensor

    each_chunk(work, weight.shape, weight.device)
    return stored
