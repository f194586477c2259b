"""`hqq`: grids that leave few large errors and many of none: least sum |w - q|^0.7 of every group.

It is the loss of Badri and Shaji 2023, "HQQ", who move a real zero point by half-quadratic splitting. Here zero points
are whole codes, as they are stored, so that moving one only shifts which weights are clipped; what is searched instead
is the range, as in `range_search`. Data-free.
"""

from __future__ import annotations

import torch

from bitpolicy.kernels.formats.grid import GridFormat
from bitpolicy.kernels.quantizers.range_search import searched_grid

_P = 0.7  # as published


def hqq(format: GridFormat, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of `weight`."""
    rows = format.rows(weight)
    grid = searched_grid(format, rows, power=_P)
    return format.store(format.nearest(rows, grid), grid, weight.shape)
