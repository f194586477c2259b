"""Formats with a grid: every group of a row has its own levels, and a code selects one of them.

A rounding method picks two things: the grid of each group, and a code for each weight. The format defines which grids
and codes exist and how they are stored. Every format has round to nearest, which spans each group's extremes and takes
the nearest code (Jacob et al. 2018, section 2.1). Grids are rounded to their storage dtype *before* codes are chosen,
so the codes are nearest to the levels that will be read back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.formats.format import Format, Shape
from bitpolicy.kernels.formats.packing import from_rows, row_length, to_rows
from bitpolicy.kernels.formats.row_chunks import quantize_in_chunks


@dataclass(frozen=True)
class Grid:
    """The levels of some groups.

    Attributes:
        scale: float32, shape (out, groups), never zero.
        zero: the code of zero, float32, same shape; None if the format stores no zero point.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None

    @property
    def wide(self) -> Grid:
        """The grid with a dimension for the weights of a group, shape (out, groups, 1)."""
        return Grid(self.scale[..., None], None if self.zero is None else self.zero[..., None])


@dataclass(frozen=True)
class GridFormat(Format):
    """A format with a grid."""

    @abstractmethod
    def run(self, length: int) -> int:
        """The group size in a row of `length` weights; the last group may be short."""

    @abstractmethod
    def grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        """Grids that span [low, high], rounded as stored; float32, shape (out, groups), low <= 0 <= high."""

    @abstractmethod
    def encode(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The nearest codes, float32, of weights on a grid that broadcasts to them."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The levels, float32, of codes on a grid that broadcasts to them."""

    @abstractmethod
    def store(self, codes: torch.Tensor, grid: Grid, shape: Shape) -> dict[str, torch.Tensor]:
        """The stored tensors of codes (out, K) and their grid."""

    @abstractmethod
    def load(self, tensors: Mapping[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, Grid]:
        """Codes, float32, shape (out, K), and the grid of every group."""

    def settled(self, weight: torch.Tensor) -> GridFormat:
        """This format with what all groups of `weight` share, for formats that store such a scale; otherwise itself.

        Args:
            weight: the whole one, any shape and float dtype. Ignored by a format that is settled already.
        """
        return self

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the grid sees it, float32, shape (out, K).

        Raises:
            FormatError: the weight has NaN or infinite values.
        """
        rows = to_rows(weight).float()
        if not torch.isfinite(rows.sum()) and not torch.isfinite(rows).all():  # the cheap check is nearly always enough
            raise FormatError(
                "the weight has NaN or infinite values, which no integer format can store; keep this layer at fp16"
            )
        return rows

    def weight(self, rows: torch.Tensor, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """The inverse of `rows`."""
        return from_rows(rows.to(dtype), shape)

    @property
    def rotation(self) -> int:
        """The block size that `rows` rotates; 0 if it does not rotate."""
        return 0

    def rotated_hessian(self, hessian: torch.Tensor) -> torch.Tensor:
        """A Hessian of the weights, shape (..., K, K) in storage order, as a Hessian of `rows`."""
        return hessian

    def extremes(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The minimum and maximum weight of each group, zero included, shape (out, groups)."""
        groups = self.grouped(rows)  # the zero padding changes neither extreme
        return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)

    def grouped(self, rows: torch.Tensor) -> torch.Tensor:
        """(out, K) -> (out, groups, group size), the last group padded with zeros."""
        run = self.run(rows.shape[1])
        return pad(rows, (0, -rows.shape[1] % run)).unflatten(1, (-1, run))

    def nearest(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The nearest codes, float32, of rows (out, K)."""
        return self.encode(self.grouped(rows), grid.wide).flatten(1)[:, : rows.shape[1]]

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        format = self.settled(weight)
        return quantize_in_chunks(format, format._to_nearest, weight)

    def _to_nearest(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.rows(weight)
        grid = self.grid(*self.extremes(rows))
        return self.store(self.nearest(rows, grid), grid, weight.shape)

    def dequantize(self, tensors: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        codes, grid = self.load(tensors, shape)
        rows = self.decode(self.grouped(codes), grid.wide).flatten(1)[:, : row_length(shape)]
        return self.weight(rows, shape, dtype)


def unless_flat(scale: torch.Tensor) -> torch.Tensor:
    """Replace zero scales by one: those of groups without range, or that underflow."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
