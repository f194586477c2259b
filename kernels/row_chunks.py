"""A weight is quantized a few rows at a time: rows are independent, so the bits are the same, and what is computed on
the way stays in the processor's cache and takes a few megabytes, however large the layer is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch

from bitpolicy.kernels.format import Format, Shape

_CHUNK = 2**20  # weights at a time; a quarter or four times of it is slower


def row_chunks(shape: Shape) -> Iterator[slice]:
    """Rows of a weight of this shape, (out, in/groups, *kernel), that are worked on together."""
    rows = max(1, _CHUNK // max(1, prod(shape[1:])))
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def quantize_in_chunks(
    format: Format, quantize: Callable[[torch.Tensor], dict[str, torch.Tensor]], weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What `quantize(weight)` gives, for a quantizer that treats each row by itself.

    Args:
        quantize: makes the stored tensors of `format`, whose first dimension is the weight's.
        weight: shape (out, in/groups, *kernel).
    """
    chunks = list(row_chunks(weight.shape))
    if len(chunks) == 1:
        return quantize(weight)
    specs = format.tensors(weight.shape, weight.dtype)
    stored = {name: torch.empty(spec.shape, dtype=spec.dtype, device=weight.device) for name, spec in specs.items()}
    for rows in chunks:
        for name, tensor in quantize(weight[rows]).items():
            stored[name][rows] = tensor
    return stored
