"""`hqq`: zero points that leave few large errors, by half-quadratic splitting (Badri and Shaji 2023, "HQQ").

    min_{z, E}  |E|_p^p + beta/2 |E - (w - Q_z^-1(Q_z(w)))|^2,   p = 0.7

in turns: E by the generalized soft threshold, z as the mean of codes minus (w - E) / scale in each group. Data-free.
The zero point is stored as a whole code, so it is rounded at each turn, and the best turn is kept. Formats without a
zero point of their own have nothing to choose.
"""

from __future__ import annotations

import torch

from bitpolicy.kernels.grid import Grid, GridFormat

_TURNS, _P = 20, 0.7
_BETA, _GROWTH = 10.0, 1.01  # as published


def hqq(format: GridFormat, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of `weight`."""
    rows = format.rows(weight)
    best = format.grid(*format.extremes(rows))
    if best.zero is not None:
        filled = format.grouped(torch.ones_like(rows[:1]))  # 1 where a group has a weight, 0 where it is padded
        best = _turns(format, format.grouped(rows), best, filled)
    return format.store(format.nearest(rows, best), best, weight.shape)


def _turns(format: GridFormat, groups: torch.Tensor, grid: Grid, filled: torch.Tensor) -> Grid:
    """The best zero points; `groups` is (out, groups, run)."""
    highest = 2.0 ** format.parameters()["bits"] - 1
    best, least, beta = grid, _loss(format, groups, grid), _BETA
    for _ in range(_TURNS):
        codes = format.encode(groups, grid.wide)
        error = _shrunk(groups - format.decode(codes, grid.wide), beta)
        centre = ((codes - (groups - error) / grid.wide.scale) * filled).sum(-1) / filled.sum(-1)
        grid = Grid(grid.scale, centre.round().clamp(0, highest))
        loss = _loss(format, groups, grid)
        better = loss < least
        assert best.zero is not None
        assert grid.zero is not None
        best, least = Grid(best.scale, torch.where(better, grid.zero, best.zero)), torch.where(better, loss, least)
        beta *= _GROWTH
    return best


def _shrunk(error: torch.Tensor, beta: float) -> torch.Tensor:
    """The generalized soft threshold of |.|_p."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-12).pow(_P - 1) / beta).clamp(min=0)


def _loss(format: GridFormat, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
    """|w - q|_p^p of every group; zero, which pads the last one, has a level of its own."""
    return (groups - format.decode(format.encode(groups, grid.wide), grid.wide)).abs().pow(_P).sum(-1)
