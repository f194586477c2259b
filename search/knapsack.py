"""The exact solver: one format a layer, least total error power within the bytes.

    minimize  sum_l e(l, f_l)   subject to   sum_l bytes(l, f_l) <= budget,

a multiple-choice knapsack (Sinha and Zoltners 1979) solved by HiGHS through `scipy.optimize.milp`. Errors are powers,
never decibels: powers of independent errors add. HiGHS stops at an absolute gap of 1e-6 that SciPy does not expose, so
the errors are scaled until the optimum is far above it, and the rounded answer is checked in whole bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from bitpolicy.search.budget import BudgetError, readable

_BYTES = 64  # unit of the size constraint: HiGHS may overshoot it by 1e-6, which has to stay far below a byte
_OPTIMUM = 1e6  # the scaled objective is at least about this


@dataclass(frozen=True)
class Solution:
    """One format index a layer.

    Attributes:
        formats: int64, shape (layers).
        error: total error power.
        nbytes: total bytes of the layers.
        gap: relative optimality gap that the solver certifies, >= 0.
    """

    formats: np.ndarray
    error: float
    nbytes: int
    gap: float


def solve(error: np.ndarray, nbytes: np.ndarray, budget: int, gap: float = 1e-4) -> Solution:
    """The cheapest choice in error that fits.

    Args:
        error: float64, shape (layers, formats), >= 0, finite.
        nbytes: int64, shape (layers, formats).
        budget: bytes for all layers together.
        gap: relative optimality gap to stop at.

    Raises:
        BudgetError: nothing fits; the message names the smallest size that can be reached.
    """
    smallest = int(nbytes.min(axis=1).sum())
    if smallest > budget:
        raise BudgetError(
            f"{budget:,} bytes for the layers are below the smallest policy, {smallest:,} bytes ({readable(smallest)})"
        )
    best_alone = np.argmin(error + 1e-15 * error.max() * nbytes / max(nbytes.max(), 1), axis=1)
    if _total(nbytes, best_alone) <= budget:
        return Solution(best_alone, _total(error, best_alone), int(_total(nbytes, best_alone)), 0.0)
    greedy = _relaxed(error, nbytes, budget)
    if _total(error, greedy) == 0:
        return Solution(greedy, 0.0, int(_total(nbytes, greedy)), 0.0)
    return _exact(error, nbytes, budget, gap, greedy)


def _exact(error: np.ndarray, nbytes: np.ndarray, budget: int, gap: float, incumbent: np.ndarray) -> Solution:
    layers = error.shape[0]
    useful = _undominated(error, nbytes)
    scale = _OPTIMUM / max(_total(error, incumbent), np.finfo(float).tiny)
    costs = (error * scale)[useful]
    column_layer = np.nonzero(useful)[0]
    one_each = csr_array((np.ones(len(costs)), (column_layer, np.arange(len(costs)))), shape=(layers, len(costs)))
    sizes = csr_array(nbytes[useful][None, :] / _BYTES)
    answer = milp(
        costs,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes, 0, budget / _BYTES)],
        options={"mip_rel_gap": gap, "time_limit": 60.0},
    )
    chosen = incumbent
    bound = 0.0
    if answer.x is not None:
        found = _formats_of(answer.x, useful)
        if _total(nbytes, found) <= budget and _total(error, found) < _total(error, incumbent):
            chosen = found
        bound = float(answer.mip_dual_bound) / scale
    total = _total(error, chosen)
    return Solution(chosen, total, int(_total(nbytes, chosen)), max(0.0, (total - bound) / total) if total > 0 else 0.0)


def _formats_of(x: np.ndarray, useful: np.ndarray) -> np.ndarray:
    """The format index of each layer from the solver's 0/1 columns, rounded."""
    full = np.full(useful.shape, -1.0)
    full[useful] = x
    return full.argmax(axis=1)


def _undominated(error: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    """Bool, shape (layers, formats): choices that no other choice of the layer beats in both error and bytes."""
    worse = (nbytes[:, :, None] >= nbytes[:, None, :]) & (error[:, :, None] >= error[:, None, :])
    strictly = (nbytes[:, :, None] > nbytes[:, None, :]) | (error[:, :, None] > error[:, None, :])
    index = np.arange(error.shape[1])
    tie_broken = worse & (strictly | (index[None, :, None] > index[None, None, :]))
    return ~np.asarray(tie_broken.any(axis=2))


def _relaxed(error: np.ndarray, nbytes: np.ndarray, budget: int) -> np.ndarray:
    """A feasible choice from the Lagrangian relaxation: bisection on the price of a byte."""
    low, high = 0.0, float(error.max()) + 1.0
    best = nbytes.argmin(axis=1)
    for _ in range(200):
        price = (low * high) ** 0.5 if low > 0 else high * 1e-6
        choice = np.argmin(error + price * nbytes, axis=1)
        if _total(nbytes, choice) <= budget:
            best, high = choice, price
        else:
            low = price
        if low > 0 and high / low < 1 + 1e-9:
            break
    return best


def _total(values: np.ndarray, choice: np.ndarray) -> float:
    return values[np.arange(len(choice)), choice].sum()
