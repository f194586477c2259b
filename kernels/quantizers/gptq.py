"""`gptq`: weights are rounded one column at a time, and the remaining columns compensate the error made so far.

For the quadratic error sum_rows dw^T H dw, the columns after j move by

    -(w_j - q_j) / [H^-1]_jj * [H^-1]_{j, j+1:}

(Frantar et al. 2023, "GPTQ", section 3; Hassibi and Stork 1993). Columns with large H_jj go first, while all the others
can still compensate for them. Grids are fixed in advance, on the original weight, by `range_search` under diag(H).

H may be block diagonal: rows of a grouped convolution see only the inputs of their own group, and for very long rows
only the diagonal blocks can be factorized. No block moves the weights of another, so all blocks are rounded in
parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from bitpolicy.kernels.formats.grid import Grid, GridFormat
from bitpolicy.kernels.quantizers.range_search import searched_grid

_DAMPING = 0.1  # times the mean diagonal, added to the diagonal
_BLOCK = 64  # columns between updates of all remaining columns


@dataclass(frozen=True)
class Curvature:
    """A damped H, prepared for rounding, with `blocks` diagonal blocks for each group of rows.

    Attributes:
        diagonal: float32, shape (groups, blocks, k).
        order: columns of each block by descending diagonal, int64, shape (groups, blocks, k).
        factor: U, upper triangular, with H^-1 = U^T U in that order, float32, shape (groups, blocks, k, k).
    """

    diagonal: torch.Tensor
    order: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor) -> Curvature:
        """Prepare H, float32, shape (groups, blocks, k, k), or (K, K) for a single block. H is positive semidefinite
        and may be scaled by any factor per group."""
        stack = hessian if hessian.ndim == 4 else hessian[None, None]
        mean = stack.diagonal(dim1=-2, dim2=-1).mean((1, 2))[:, None, None, None]
        scaled = torch.where(mean > 0, stack / mean, 0.0)
        damped = scaled + _DAMPING * torch.eye(stack.shape[-1], device=stack.device)
        diagonal = damped.diagonal(dim1=-2, dim2=-1).clone()
        order = diagonal.argsort(dim=-1, descending=True, stable=True)
        rows = damped.gather(-2, order[..., None].expand_as(damped))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(rows.gather(-1, order[..., None, :].expand_as(rows))))
        return cls(diagonal, order, torch.linalg.cholesky(inverse, upper=True))

    def of_rows(self, out: int, length: int) -> torch.Tensor:
        """The diagonal of each of `out` rows of `length`, float32, shape (out, K), or (1, K) if all rows share it."""
        of_group = self.diagonal.flatten(1)[:, :length]
        return of_group if len(of_group) == 1 else of_group.repeat_interleave(out // len(of_group), 0)

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """(out, K) -> (groups x blocks, out / groups, k), columns in order; the last block is padded with zeros."""
        groups, blocks, k = self.order.shape
        cut = pad(rows, (0, blocks * k - rows.shape[1])).unflatten(1, (blocks, k)).unflatten(0, (groups, -1))
        return cut.transpose(1, 2).flatten(0, 1).gather(-1, self._places(len(rows)))

    def joined(self, parts: torch.Tensor, length: int) -> torch.Tensor:
        """The inverse of `split`, shape (out, length)."""
        groups, blocks, _ = self.order.shape
        out = parts.shape[1] * groups
        cut = torch.empty_like(parts).scatter_(-1, self._places(out), parts)
        return cut.unflatten(0, (groups, blocks)).transpose(1, 2).flatten(0, 1).flatten(1)[:, :length].contiguous()

    def _places(self, out: int) -> torch.Tensor:
        return self.order.flatten(0, 1)[:, None, :].expand(-1, out // len(self.order), -1)


def gptq(format: GridFormat, weight: torch.Tensor, curvature: Curvature) -> dict[str, torch.Tensor]:
    """The stored tensors of `weight`, shape (out, in/groups, *kernel).

    Args:
        curvature: of H in storage order, from `format.rotated_hessian`.
    """
    format, rows = format.settled(weight), format.rows(weight)
    grid = searched_grid(format, rows, curvature.of_rows(*rows.shape))
    group = torch.arange(rows.shape[1], device=rows.device) // format.run(rows.shape[1])
    scale = curvature.split(grid.scale[:, group])
    zero = None if grid.zero is None else curvature.split(grid.zero[:, group])
    by_column = Grid(torch.where(scale == 0, 1.0, scale), zero)  # block padding has scale 0 and must not divide by it
    codes = _codes(format, curvature.split(rows), by_column, curvature.factor.flatten(0, 1))
    return format.store(curvature.joined(codes, rows.shape[1]), grid, weight.shape)


def _codes(format: GridFormat, left: torch.Tensor, grid: Grid, factor: torch.Tensor) -> torch.Tensor:
    """Codes of `left`, shape (B, rows, k), column by column. In `grid` every column has its own levels. Overwrites
    `left`."""
    codes = torch.empty_like(left)
    scaled = factor / factor.diagonal(dim1=-2, dim2=-1)[..., None]
    for start in range(0, left.shape[-1], _BLOCK):
        end = min(start + _BLOCK, left.shape[-1])
        block = left[..., start:end]
        errors = torch.empty_like(block)
        for j in range(start, end):
            at, column = slice(j, j + 1), left[..., j : j + 1]
            levels = Grid(grid.scale[..., at], None if grid.zero is None else grid.zero[..., at])
            codes[..., at] = format.encode(column, levels)
            errors[..., j - start : j - start + 1] = column - format.decode(codes[..., at], levels)
            error = errors[..., j - start : j - start + 1]
            left[..., j:end].baddbmm_(error, scaled[:, at, j:end], alpha=-1)
        left[..., end:].baddbmm_(errors, scaled[:, start:end, end:], alpha=-1)
    return codes
