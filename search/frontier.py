"""The frontier of bytes against error from one table, and its inverse: the fewest bytes for a given error.

    frontier   minimize  sum_l e(l, f_l)   subject to   sum_l b(l, f_l) <= B,   for many B
    smallest   minimize  sum_l b(l, f_l)   subject to   sum_l e(l, f_l) <= E

The Lagrangian hull (bitpolicy.search.hull) is the convex part of the frontier: thousands of policies, each exact for
its own bytes. Between its points, the knapsack solver finds a policy, with the hull's bound. If the error is given
instead, the same solver runs with bytes as the cost and errors as the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bitpolicy.search.budget import BudgetError
from bitpolicy.search.hull import Hull, total
from bitpolicy.search.knapsack import SECONDS, Solution, least, relative_gap, solve_hull

_FLOAT = 1e-9  # relative accuracy of a bound on a whole number of bytes


def points(error: np.ndarray, nbytes: np.ndarray) -> list[Solution]:
    """The corners of the Lagrangian hull, from the smallest policy to the most accurate; each is exact for its bytes.

    Args:
        error: float64, shape (layers, formats), >= 0; infinite where a layer may not have the format.
        nbytes: int64, shape (layers, formats).

    Raises:
        BitPolicyError: as in `solve`.
    """
    hull = Hull.of(error, nbytes)
    corners = np.concatenate([[True], np.diff(hull.rate, append=0.0) < 0])
    return [_solution(hull.choice(int(steps)), error, nbytes, 0.0) for steps in corners.nonzero()[0]]


def frontier(
    error: np.ndarray, nbytes: np.ndarray, budgets: Sequence[int], gap: float = 1e-4, seconds: float = SECONDS
) -> list[Solution]:
    """The solution for each budget, in the order given. A larger budget never gives a larger error.

    Args:
        error, nbytes: as in `points`.
        budgets: bytes for all layers together.
        gap: relative optimality gap to stop at.
        seconds: time limit per budget; the best solution found by then is returned with its gap.

    Raises:
        BudgetError: a budget is below the smallest policy.
        BitPolicyError: as in `solve`.
    """
    hull = Hull.of(error, nbytes)
    solved: dict[int, Solution] = {}
    known = None
    for budget in sorted(set(budgets)):
        solved[budget] = solve_hull(hull, budget, gap, seconds, known)
        known = solved[budget].formats
    return [solved[budget] for budget in budgets]


def smallest(
    error: np.ndarray, nbytes: np.ndarray, target: float, gap: float = 1e-4, seconds: float = SECONDS
) -> Solution:
    """The policy with the fewest bytes whose total error is at most `target`. Its gap is in bytes.

    Args:
        error, nbytes: as in `points`.
        target: total error power.
        gap: relative optimality gap to stop at.
        seconds: time limit; the best solution found by then is returned with its gap.

    Raises:
        BudgetError: no policy is that accurate; the message gives the smallest possible error.
        BitPolicyError: as in `solve`.
    """
    exactest = Hull.of(error, nbytes).cost.argmin(axis=1)
    if not total(error, exactest) <= target:
        raise BudgetError(
            f"an error of {target:.4g} is below the smallest that any policy has, {total(error, exactest):.4g}; "
            "raise the target or add a larger format to --formats"
        )
    possible = np.isfinite(error) & (error <= target)
    target = min(target, 2 * float(np.where(possible, error, 0).max(axis=1).sum()))  # must be finite, need not be tight
    hull = Hull.of(np.where(possible, nbytes, np.inf), error)
    choice, bound = least(hull, target, gap, seconds)
    whole = math.ceil(bound * (1 - _FLOAT))
    return _solution(choice, error, nbytes, relative_gap(float(total(nbytes, choice)), whole))


def _solution(choice: np.ndarray, error: np.ndarray, nbytes: np.ndarray, gap: float) -> Solution:
    return Solution(choice, float(total(error, choice)), int(total(nbytes, choice)), gap)
