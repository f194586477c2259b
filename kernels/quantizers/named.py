"""The quantizers that exist: who picks grids and codes for a format.

    rtn              round to nearest; every format's own
    mse              the same on grids of least squared weight error
    hqq              the same on grids that leave few large errors
    gptq             weights take up each other's errors, as the layer's inputs say
    gptq-trajectory  as the inputs weighed by what the finished image sees of the output

The first three need only the weight; the others a Hessian, so what they made is kept with the calibration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.grid import GridFormat
from bitpolicy.kernels.formats.row_chunks import quantize_in_chunks
from bitpolicy.kernels.quantizers.hqq import hqq
from bitpolicy.kernels.quantizers.range_search import mse

RTN = "rtn"
AUTO = "auto"
DEFAULT = "gptq"  # docs/decisions.md says why
_DATA_FREE: dict[str, Callable[[GridFormat, torch.Tensor], dict[str, torch.Tensor]]] = {
    RTN: lambda format, weight: format.quantize(weight),
    "mse": mse,
    "hqq": hqq,
}
HESSIANS = {"gptq": "inputs", "gptq-trajectory": "trajectory"}
"""Quantizers that need a Hessian -> which one."""
QUANTIZERS = (*_DATA_FREE, *HESSIANS)


def parse_quantizer(name: str) -> tuple[str, ...]:
    """The quantizers that `--quantizer` asks to be tried; "auto" is all of them.

    Raises:
        BitPolicyError: there is none of that name.
    """
    wanted = name.strip().lower()
    if wanted == AUTO:
        return QUANTIZERS
    if wanted not in QUANTIZERS:
        raise BitPolicyError(f"unknown quantizer {name!r}; write any of {', '.join((*QUANTIZERS, AUTO))}")
    return (wanted,)


def quantize_data_free(quantizer: str, format: GridFormat, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of `weight` by a quantizer that needs nothing else."""
    return quantize_in_chunks(format, partial(_DATA_FREE[quantizer], format), weight)
