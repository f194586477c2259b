"""`gptq`: weights are rounded one column at a time, and those that are left take up the error made so far.

For the quadratic error sum_rows dw^T H dw, the columns after j move by

    -(w_j - q_j) / [H^-1]_jj * [H^-1]_{j, j+1:}

(Frantar et al. 2023, "GPTQ", section 3; Hassibi and Stork 1993). Columns of large H_jj go first, while all the others
can still make up for them. Grids are fixed beforehand, on the weight as it is, by `range_search` under diag(H).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitpolicy.kernels.grid import Grid, GridFormat
from bitpolicy.kernels.range_search import searched_grid

_DAMPING = 0.1  # of the mean diagonal, added to it
_BLOCK = 64  # columns between updates of the whole remainder


@dataclass(frozen=True)
class Curvature:
    """A damped H, prepared for rounding.

    Attributes:
        diagonal: float32, shape (K).
        order: columns by falling diagonal, int64, shape (K).
        factor: U, upper triangular, with H^-1 = U^T U in that order, float32, shape (K, K).
    """

    diagonal: torch.Tensor
    order: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor) -> Curvature:
        """Of H, float32, shape (K, K), positive semidefinite, up to any factor."""
        mean = hessian.diagonal().mean()
        scaled = hessian / mean if mean > 0 else torch.zeros_like(hessian)
        damped = scaled + _DAMPING * torch.eye(len(hessian), device=hessian.device)
        order = damped.diagonal().argsort(descending=True, stable=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
        return cls(damped.diagonal().clone(), order, torch.linalg.cholesky(inverse, upper=True))


def gptq(format: GridFormat, weight: torch.Tensor, curvature: Curvature) -> dict[str, torch.Tensor]:
    """The stored tensors of `weight`, shape (out, in/groups, *kernel).

    Args:
        curvature: of H in wire order, as `format.rotated_hessian` has it.
    """
    rows = format.rows(weight)
    grid = searched_grid(format, rows, curvature.diagonal)
    run = format.run(rows.shape[1])
    order = curvature.order
    codes = torch.empty_like(rows)
    codes[:, order] = _codes(format, rows[:, order], grid, (order // run).tolist(), curvature.factor)
    return format.store(codes, grid, weight.shape)


def _codes(format: GridFormat, rows: torch.Tensor, grid: Grid, groups: list[int], factor: torch.Tensor) -> torch.Tensor:
    """Codes of `rows`, whose column j belongs to `groups[j]`, column by column."""
    left, codes = rows.clone(), torch.empty_like(rows)
    scaled = factor / factor.diagonal()[:, None]
    for start in range(0, rows.shape[1], _BLOCK):
        end = min(start + _BLOCK, rows.shape[1])
        block = left[:, start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            levels = grid.at(groups[start + j])
            column = block[:, j : j + 1]
            code = format.encode(column, levels)
            codes[:, start + j : start + j + 1] = code
            errors[:, j : j + 1] = column - format.decode(code, levels)
            block[:, j:].addmm_(errors[:, j : j + 1], scaled[start + j : start + j + 1, start + j : end], alpha=-1)
        left[:, end:].addmm_(errors, scaled[start:end, end:], alpha=-1)
    return codes
