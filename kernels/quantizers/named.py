"""The available rounding methods, which pick the grids and codes of a format.

    rtn              round to nearest; every format has it
    mse              round to nearest, on the grids with least squared weight error
    hqq              round to nearest, on grids that leave few large errors
    gptq             weights compensate each other's errors, weighted by the layer's inputs
    gptq-trajectory  the same, with the inputs also weighted by how the layer's output affects the finished image

The first three need only the weight. The others need a Hessian, so their results are stored with the calibration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.grid import GridFormat
from bitpolicy.kernels.formats.row_chunks import quantize_in_chunks
from bitpolicy.kernels.quantizers.range_search import hqq, mse

RTN = "rtn"
AUTO = "auto"
_DATA_FREE: dict[str, Callable[[GridFormat, torch.Tensor], dict[str, torch.Tensor]]] = {
    RTN: lambda format, weight: format.quantize(weight),
    "mse": mse,
    "hqq": hqq,
}
HESSIANS = {"gptq": "inputs", "gptq-trajectory": "trajectory"}
"""Rounding methods that need a Hessian -> which one."""
QUANTIZERS = (*_DATA_FREE, *HESSIANS)


def parse_quantizer(name: str) -> tuple[str, ...]:
    """The rounding methods that `--quantizer` selects; "auto" selects all of them.

    Raises:
        BitPolicyError: there is no rounding method of that name.
    """
    wanted = name.strip().lower()
    if wanted == AUTO:
        return QUANTIZERS
    if wanted not in QUANTIZERS:
        raise BitPolicyError(f"unknown quantizer {name!r}; write any of {', '.join((*QUANTIZERS, AUTO))}")
    return (wanted,)


def quantize_data_free(quantizer: str, format: GridFormat, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of `weight` by a data-free rounding method."""
    format = format.settled(weight)
    return quantize_in_chunks(format, partial(_DATA_FREE[quantizer], format), weight)
