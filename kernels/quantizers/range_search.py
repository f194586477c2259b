"""`mse` and `hqq`: narrower grids, where clipping a few weights rounds all the others better.

Among grids that span [a low, b high], with a and b in (0, 1], each group takes the one with the least weighted error

    sum_k d_k |w_k - q_k|^p,

where d is 1 or the diagonal of a Hessian (as in GPTQ's act-order and AWQ's salience). Data-free without d.

`mse` has p = 2. `hqq` has p = 0.7, which accepts a few large errors for many near zero. This is the loss of Badri and
Shaji 2023, "HQQ", who move a real-valued zero point by half-quadratic splitting. Here zero points are stored as whole
codes, so moving one only changes which weights are clipped, and the range is searched instead.
"""

from __future__ import annotations

import torch

from bitpolicy.kernels.formats.grid import Grid, GridFormat

_SHRINK = [1 - 0.05 * i for i in range(9)]  # 1.0 down to 0.6 of an extreme
_HQQ_POWER = 0.7  # the published value


def searched_grid(
    format: GridFormat, rows: torch.Tensor, weight: torch.Tensor | None = None, power: float = 2.0
) -> Grid:
    """The best grid of every group among the candidates.

    Args:
        rows: from `format.rows`, float32, shape (out, K).
        weight: d, float32, shape (K), or (out, K) if rows differ, >= 0; None means 1.
        power: p, > 0.
    """
    low, high = format.extremes(rows)
    groups = format.grouped(rows)
    share = None if weight is None else format.grouped(torch.atleast_2d(weight))
    best = format.grid(low, high)
    least = _errors(format, groups, best, share, power)
    for a in _SHRINK:
        for b in _SHRINK:
            if not _worth_trying(format, a, b):
                continue
            tried = format.grid(low * a, high * b)
            error = _errors(format, groups, tried, share, power)
            better = error < least
            least = torch.where(better, error, least)
            zero = None if best.zero is None or tried.zero is None else torch.where(better, tried.zero, best.zero)
            best = Grid(torch.where(better, tried.scale, best.scale), zero)
    return best


def mse(format: GridFormat, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of `weight` on the grids with least squared error."""
    return _nearest(format, weight, 2.0)


def hqq(format: GridFormat, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of `weight` on the grids with least sum |w - q|^0.7."""
    return _nearest(format, weight, _HQQ_POWER)


def _nearest(format: GridFormat, weight: torch.Tensor, power: float) -> dict[str, torch.Tensor]:
    format, rows = format.settled(weight), format.rows(weight)
    grid = searched_grid(format, rows, power=power)
    return format.store(format.nearest(rows, grid), grid, weight.shape)


def _worth_trying(format: GridFormat, a: float, b: float) -> bool:
    """Very different a and b are seldom best, so they are skipped. A symmetric grid has only one end."""
    if format.parameters().get("symmetric", True):
        return a == b and a < 1
    return abs(a - b) < 0.16 and (a, b) != (1, 1)


def _errors(
    format: GridFormat, groups: torch.Tensor, grid: Grid, weight: torch.Tensor | None, power: float
) -> torch.Tensor:
    """The error of every group, float32, shape (out, groups)."""
    error = format.decode(format.encode(groups, grid.wide), grid.wide).sub_(groups)
    error = error.square_() if power == 2 else error.abs_().pow_(power)
    return (error if weight is None else error.mul_(weight)).sum(-1)
