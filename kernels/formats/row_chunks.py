"""Quantizes a weight a few rows at a time. Rows are independent, so the bits are the same, while intermediate results
stay in the processor's cache and take a few megabytes, however large the layer is.

Each thread computes whole chunks on its own. If torch split every operation instead, threads would wait for each other
some twenty times per chunk, which on a busy machine is ten times slower than one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod

import torch

from bitpolicy.kernels.formats.format import Format, Shape

_CHUNK = 2**20  # weights per chunk; both a quarter and four times of this are slower


def each_chunk(work: Callable[[slice], None], shape: Shape, device: torch.device) -> None:
    """Call `work` for all rows of a weight, in chunks; on the CPU, several chunks at once.

    Args:
        work: takes a slice of rows, and must not touch other rows.
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
                list(pool.map(work, chunks))  # re-raises exceptions of `work`


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Inside the block, torch operations use one thread, also in threads started there."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def of_rows(tensors: Mapping[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    """The stored tensors of some rows of a weight. A tensor without dimensions belongs to all rows."""
    return {suffix: tensor[rows] if tensor.ndim else tensor for suffix, tensor in tensors.items()}


def quantize_in_chunks(
    format: Format, quantize: Callable[[torch.Tensor], dict[str, torch.Tensor]], weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The result of `quantize(weight)`, for a rounding method that treats each row on its own.

    Args:
        quantize: returns the stored tensors of `format`, whose first dimension is the weight's; those without
            dimensions are the same for all rows.
        weight: shape (out, in/groups, *kernel).
    """
    if weight.numel() <= _CHUNK:
        with _single_threaded():
            return quantize(weight)
    specs = format.tensors(weight.shape, weight.dtype)
    stored = {name: torch.empty(spec.shape, dtype=spec.dtype, device=weight.device) for name, spec in specs.items()}

    def work(rows: slice) -> None:
        for name, tensor in quantize(weight[rows]).items():
            (stored[name][rows] if tensor.ndim else stored[name]).copy_(tensor)

    each_chunk(work, weight.shape, weight.device)
    return stored
