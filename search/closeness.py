"""Finds the estimates that a solution depends on most, which are worth measuring before the solution is trusted.

At the price per byte that the solution implies, a layer costs error + price x bytes in each format, and the solver
takes the cheapest. A choice is close if the runner-up costs more by less than the standard deviation of the estimate.
An error from R sketches has a relative standard deviation of about sqrt(2 / R), that of a chi-squared mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitpolicy.search.knapsack import Solution
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.table import FIRST_ORDER

Place = tuple[int, int]


def beyond_first_order(problem: Problem, solution: Solution, count: int) -> list[Place]:
    """Up to `count` unmeasured places (layer, column of the packed format) that the solution chose and whose estimates
    are too large to be trusted, largest first."""
    error, chosen = problem.errors(), np.asarray(solution.formats)
    paid = error[np.arange(len(chosen)), chosen]
    return _unmeasured(problem, [(i, chosen[i]) for i in np.argsort(-paid) if paid[i] > FIRST_ORDER], count)


def close_choices(problem: Problem, solution: Solution, count: int) -> list[Place]:
    """Up to `count` unmeasured places whose estimates decide a close choice, both formats of a layer, the widest spread
    first."""
    table, chosen = problem.table, np.asarray(solution.formats)
    error, nbytes = problem.errors(), problem.sizes()
    rows = np.arange(len(chosen))
    cost = error + _price(error, nbytes, chosen) * nbytes
    margin = cost - cost[rows, chosen][:, None]
    margin[rows, chosen] = np.inf
    rival = margin.argmin(axis=1)
    sketches = 1 if table.sketches is None else len(table.sketches)
    spread = (2 / sketches) ** 0.5 * np.maximum(error[rows, chosen], error[rows, rival])
    close = [i for i in np.argsort(-spread) if margin[i, rival[i]] < spread[i]]
    return _unmeasured(problem, [(i, column) for i in close for column in (chosen[i], rival[i])], count)


def _unmeasured(problem: Problem, wanted: Sequence[tuple[int, int]], count: int) -> list[Place]:
    places = [_packed(problem, int(i), int(column)) for i, column in wanted]
    fresh = [place for place in places if place is not None and problem.table.source(*place) != "ablation"]
    return list(dict.fromkeys(fresh))[:count]


def _packed(problem: Problem, layer: int, column: int) -> Place | None:
    """A column of the problem as a place in the table, or None for FP16, which the table does not have."""
    format = problem.formats[column]
    return (layer, problem.table.formats.index(format)) if format.packed else None


def _price(error: np.ndarray, nbytes: np.ndarray, chosen: np.ndarray) -> float:
    """Error per byte, between the best exchange that was not made and the worst that was."""
    rows = np.arange(len(chosen))
    saved = error[rows, chosen][:, None] - error
    more = nbytes - nbytes[rows, chosen][:, None]
    rates = np.divide(saved, more, out=np.zeros_like(saved), where=more != 0)
    upgrades, downgrades = rates[more > 0], rates[more < 0]
    low = float(upgrades.max(initial=0.0))
    high = float(downgrades[downgrades > 0].min(initial=np.inf))
    return low if not np.isfinite(high) else (max(low, 0.0) + high) / 2
