"""Which numbers a solution hangs on: those that are worth measuring before it is believed.

At the price of a byte that the solution implies, a layer costs error + price x bytes in each format, and the solver
takes the cheapest. Where the runner-up is dearer by less than the estimate's own spread, the choice is close. An error
from R sketches has a relative standard deviation of about sqrt(2 / R), that of a chi-squared mean.
"""

from __future__ import annotations

import numpy as np

from bitpolicy.search.knapsack import Solution
from bitpolicy.search.study import Problem
from bitpolicy.sensitivity.table import FIRST_ORDER

Place = tuple[int, int]


def worth_measuring(problem: Problem, solution: Solution, count: int) -> list[Place]:
    """Up to `count` places (layer, column of the packed format) of estimates that decide the solution.

    First those of chosen formats beyond first order, largest first, then those of close choices, the widest spread
    first. Places that were measured already are passed over.
    """
    table, chosen = problem.table, np.asarray(solution.formats)
    error, nbytes = problem.errors(), problem.sizes()
    rows = np.arange(len(chosen))
    large = [i for i in np.argsort(-error[rows, chosen]) if error[i, chosen[i]] > FIRST_ORDER]
    cost = error + _price(error, nbytes, chosen) * nbytes
    margin = cost - cost[rows, chosen][:, None]
    margin[rows, chosen] = np.inf
    rival = margin.argmin(axis=1)
    sketches = 1 if table.sketches is None else len(table.sketches)
    spread = (2 / sketches) ** 0.5 * np.maximum(error[rows, chosen], error[rows, rival])
    close = [i for i in np.argsort(-spread) if margin[i, rival[i]] < spread[i]]
    wanted = [(i, chosen[i]) for i in large] + [(i, column) for i in close for column in (chosen[i], rival[i])]
    places = [_packed(problem, int(i), int(column)) for i, column in wanted]
    unmeasured = [p for p in places if p is not None and table.source(*p) != "ablation"]
    return list(dict.fromkeys(unmeasured))[:count]


def _packed(problem: Problem, layer: int, column: int) -> Place | None:
    """The place in the table of a column of the problem, which has FP16, too; None for that."""
    format = problem.formats[column]
    return (layer, problem.table.formats.index(format)) if format.packed else None


def _price(error: np.ndarray, nbytes: np.ndarray, chosen: np.ndarray) -> float:
    """Error a byte, between the best exchange that was not taken and the worst that was."""
    rows = np.arange(len(chosen))
    saved = error[rows, chosen][:, None] - error
    more = nbytes - nbytes[rows, chosen][:, None]
    rates = np.divide(saved, more, out=np.zeros_like(saved), where=more != 0)
    upgrades, downgrades = rates[more > 0], rates[more < 0]
    low = float(upgrades.max(initial=0.0))
    high = float(downgrades[downgrades > 0].min(initial=np.inf))
    return low if not np.isfinite(high) else (max(low, 0.0) + high) / 2
