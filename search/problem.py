"""The decision of a search: a format for each layer, within a number of bytes.

The solver sees a matrix of errors and one of sizes. Whatever may not be chosen has infinite error: a format that does
not fit a layer's shape, and every other format of a pinned layer. Layers that share a format become one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.policy import Choice
from bitpolicy.search.frontier import frontier, points, smallest
from bitpolicy.search.knapsack import Solution, solve
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.table import SensitivityTable


@dataclass(frozen=True)
class PolicySpace:
    """The policies that a search chooses from.

    Attributes:
        inventory: the layers, L of them.
        formats: the candidates, F of them, FP16 among them.
        account: their bytes.
        pinned: layer name -> the one format it may have.
        tied: groups of layer names that share a format; a layer is in at most one group.
        barred: (layer name, format) pairs that may not be chosen.

    Raises:
        BitPolicyError: on construction, if a layer is pinned to a format that is no candidate.
    """

    inventory: Sequence[Layer]
    formats: Sequence[Format]
    account: ByteAccount
    pinned: Mapping[str, Format] = field(default_factory=dict)
    tied: Sequence[Sequence[str]] = ()
    barred: frozenset[tuple[str, Format]] = frozenset()

    def __post_init__(self) -> None:
        missing = {name: f.name for name, f in self.pinned.items() if f not in self.formats}
        if missing:
            name, format = next(iter(missing.items()))
            raise BitPolicyError(f"{name} is kept at {format}, which is no candidate; add {format} to --formats")

    def problem(self, table: SensitivityTable, budget: int) -> Problem:
        """The problem of finding the best of these policies within `budget` tensor bytes."""
        return Problem(
            self.inventory,
            self.formats,
            self.account,
            self.pinned,
            self.tied,
            self.barred,
            table=table,
            budget=budget,
        )

    @property
    def smallest(self) -> int:
        """Tensor bytes of the smallest allowed policy."""
        sizes = self.merged(np.where(self.allowed(), self.sizes(), np.inf))
        return self.account.fixed + int(sizes.min(axis=1).sum())

    def merged(self, values: np.ndarray, rows: Sequence[Sequence[int]] | None = None) -> np.ndarray:
        """Sums over the layers that share a format: (L, F) -> (rows, F), for all rows or the given `rows`."""
        return np.stack([values[row].sum(0) for row in (self.rows() if rows is None else rows)])

    def rows(self) -> list[list[int]]:
        """The layers' indices, grouped by shared format."""
        place = {layer.name: i for i, layer in enumerate(self.inventory)}
        together = {place[group[0]]: [place[name] for name in group] for group in self.tied}
        later = {i for row in together.values() for i in row[1:]}
        return [together.get(i, [i]) for i in range(len(self.inventory)) if i not in later]

    def spread(self, solution: Solution) -> Solution:
        """Turn a solution over `rows` into one over layers."""
        formats = np.zeros(len(self.inventory), dtype=np.int64)
        for row, chosen in zip(self.rows(), solution.formats, strict=True):
            formats[row] = chosen
        return Solution(formats, solution.error, solution.nbytes, solution.gap)

    def allowed(self) -> np.ndarray:
        """Whether each layer may have each format, bool, shape (L, F)."""
        return np.array([[self._allows(layer, format) for format in self.formats] for layer in self.inventory])

    def _allows(self, layer: Layer, format: Format) -> bool:
        pin = self.pinned.get(layer.name, format)
        return format == pin and format.fits(layer.shape) and (layer.name, format) not in self.barred

    def sizes(self) -> np.ndarray:
        """Bytes, int64, shape (L, F)."""
        return np.array([[self.account.layer(layer.name, f) for f in self.formats] for layer in self.inventory])

    @property
    def groups(self) -> list[str]:
        return sorted({layer.group for layer in self.inventory})


@dataclass(frozen=True, kw_only=True)
class Problem(PolicySpace):
    """Which policy of the space harms the image least within a budget.

    Attributes:
        table: the sensitivities of the layers.
        budget: tensor bytes the whole target may have.
    """

    table: SensitivityTable
    budget: int

    def solve(self, multipliers: Mapping[str, float] | None = None, budget: int | None = None) -> Solution:
        """The exact solution.

        Args:
            multipliers: by which the errors of a group of layers are bent first.
            budget: tensor bytes of the whole target, if it is another than the problem's.

        Raises:
            BudgetError: no policy is as small.
        """
        error = self.errors()
        if multipliers:
            error *= np.array([multipliers.get(layer.group, 1.0) for layer in self.inventory])[:, None]
        errors, sizes = self.merged(error), self.merged(self.sizes())
        limit = self.budget if budget is None else budget
        return self.spread(solve(errors, sizes, limit - self.account.fixed))

    def frontier(self, budgets: Sequence[int]) -> list[Solution]:
        """The exact solution for each number of tensor bytes of the whole target.

        Raises:
            BudgetError: a budget is below the smallest policy.
        """
        limits = [budget - self.account.fixed for budget in budgets]
        return [self.spread(found) for found in frontier(self.merged(self.errors()), self.merged(self.sizes()), limits)]

    def corners(self) -> list[Solution]:
        """The corners of the convex part of the frontier, smallest first: each is exact for its own bytes, and none had
        to be solved for."""
        return [self.spread(found) for found in points(self.merged(self.errors()), self.merged(self.sizes()))]

    def smallest_within(self, error: float) -> Solution:
        """The fewest bytes whose predicted error is at most `error`.

        Raises:
            BudgetError: no policy is that accurate.
        """
        return self.spread(smallest(self.merged(self.errors()), self.merged(self.sizes()), error))

    def errors(self) -> np.ndarray:
        """Scores, float64, shape (L, F); infinite where a format may not be chosen."""
        error = np.array([[self.table.score(i, f) for f in self.formats] for i in range(len(self.inventory))])
        return np.where(self.allowed(), error, np.inf)

    def choices(self, solution: Solution) -> dict[str, Choice]:
        """Layer name -> choice."""
        picked = [self.formats[index] for index in solution.formats]
        return {
            layer.name: self.table.choice(i, f) for i, (layer, f) in enumerate(zip(self.inventory, picked, strict=True))
        }
