"""`hqq`: grids that leave a few large errors and many near zero, by minimizing sum |w - q|^0.7 in every group.

This is the loss of Badri and Shaji 2023, "HQQ", who move a real-valued zero point by half-quadratic splitting. Here
zero points are stored as whole codes, so moving one only changes which weights are clipped. The range is searched
instead, as in `range_search`. Data-free.
"""

from __future__ import annotations

import torch

from bitpolicy.kernels.formats.grid import GridFormat
from bitpolicy.kernels.quantizers.range_search import searched_grid

_P = 0.7  # the published value


def hqq(format: GridFormat, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of `weight`."""
    rows = format.rows(weight)
    grid = searched_grid(format, rows, power=_P)
    return format.store(format.nearest(rows, grid), grid, weight.shape)
