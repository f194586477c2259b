"""The exact solver: one format per layer, with the least total error power within the bytes.

    minimize  sum_l e(l, f_l)   subject to   sum_l b(l, f_l) <= B,

a multiple-choice knapsack (Sinha and Zoltners 1979). Errors are powers, never decibels, because powers of independent
errors add. The Lagrangian relaxation (bitpolicy.search.hull) gives a first choice, a lower bound and reduced costs. A
column whose reduced cost exceeds the difference between the two cannot be part of a better choice and is dropped. Of
thousands of columns, this leaves a few dozen for HiGHS (`scipy.optimize.milp`). HiGHS stops at an absolute gap of 1e-6
that SciPy does not expose, so costs are scaled until the optimum is far above it, and its rounded answer is checked in
whole bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from bitpolicy.search.budget import BudgetError, readable
from bitpolicy.search.hull import Hull, exchanged, total

_BYTES = 64  # unit of the size constraint: HiGHS may overshoot by 1e-6 units, which must stay far below one byte
_OPTIMUM = 1e6  # approximate size of the scaled objective
_ROUNDS = 6  # solves per problem: each rescales to a better incumbent, or tightens a limit that was overshot
SECONDS = 60.0


@dataclass(frozen=True)
class Solution:
    """One format index per layer.

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
    """The choice with the least error that fits.

    Args:
        error: float64, shape (layers, formats), >= 0; infinite where a layer may not have the format.
        nbytes: int64, shape (layers, formats).
        budget: bytes for all layers together.
        gap: relative optimality gap to stop at.

    Raises:
        BudgetError: nothing fits; the message gives the smallest possible size.
        BitPolicyError: a layer has no allowed format, or an error is negative or NaN.
    """
    return solve_hull(Hull.of(error, nbytes), budget, gap)


def solve_hull(
    hull: Hull, budget: int, gap: float = 1e-4, seconds: float = SECONDS, known: np.ndarray | None = None
) -> Solution:
    """`solve` for an existing hull of errors and bytes. `known` is a choice that fits.

    Raises:
        BudgetError: nothing fits.
    """
    smallest = int(hull.weights[0])
    if smallest > budget:
        raise BudgetError(
            f"{budget:,} bytes for the layers are below the smallest policy, {smallest:,} bytes "
            f"({readable(smallest)}); raise --budget or add a smaller format to --formats"
        )
    choice, bound = least(hull, budget, gap, seconds, known)
    error = float(total(hull.cost, choice))
    return Solution(choice, error, int(total(hull.weight, choice)), relative_gap(error, bound))


def least(
    hull: Hull, limit: float, gap: float, seconds: float = SECONDS, known: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """The choice of least cost within `limit`, and a lower bound on the cost of any. At least one choice must fit."""
    end = time.monotonic() + seconds
    base, bound, reduced = hull.relaxed(limit)
    best = exchanged(hull, limit, base, reduced)
    if known is not None and total(hull.cost, known) < total(hull.cost, best):
        best = known
    kept_off = 0.0
    for _ in range(_ROUNDS):
        cost, left = float(total(hull.cost, best)), end - time.monotonic()
        if relative_gap(cost, bound) <= gap or left <= 0:
            break
        useful = bound + reduced <= cost * (1 + 1e-9)
        found, low = _highs(hull, base, useful, limit - kept_off, cost, 0.9 * gap, left)
        if kept_off == 0:  # the bound holds: dropped columns could only raise the cost
            bound = max(bound, min(low, cost))
        if (over := float(total(hull.weight, found) - limit)) > 0:
            kept_off += over
        elif total(hull.cost, found) < cost:
            best = found
        else:
            break
    return best, bound


def relative_gap(cost: float, bound: float) -> float:
    """By what share of `cost` the optimum may be lower."""
    return max(0.0, (cost - bound) / cost) if cost > 0 else 0.0


def _highs(
    hull: Hull, base: np.ndarray, useful: np.ndarray, limit: float, cost: float, gap: float, seconds: float
) -> tuple[np.ndarray, float]:
    """The best choice that HiGHS finds among the useful columns, and its lower bound. The variables are changes of
    `base`, at most one per layer, and a column that is always taken, so that HiGHS' relative gap is that of the
    total."""
    scale, other = _OPTIMUM / cost, np.arange(hull.cost.shape[1]) != base[:, None]
    layer, format = (useful & other).nonzero()
    if not len(layer):
        return base, cost
    dearer = (hull.cost[layer, format] - hull.cost[layer, base[layer]]) * scale
    unit = _BYTES if hull.weight.dtype.kind == "i" else limit / _OPTIMUM
    more = (hull.weight[layer, format] - hull.weight[layer, base[layer]]) / unit
    columns = len(layer) + 1
    present, at = np.unique(layer, return_inverse=True)
    one_each = csr_array((np.ones(len(layer)), (at, np.arange(len(layer)))), shape=(len(present), columns))
    with _without_stdout():
        answer = milp(
            np.append(dearer, total(hull.cost, base) * scale),
            integrality=np.ones(columns),
            bounds=Bounds(np.append(np.zeros(len(layer)), 1), 1),
            constraints=[
                LinearConstraint(one_each, -np.inf, 1),
                LinearConstraint(
                    csr_array(np.append(more, 0)[None]), -np.inf, (limit - total(hull.weight, base)) / unit
                ),
            ],
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )
    found = base.copy()
    if answer.x is not None:
        taken = answer.x[:-1] > 0.5
        found[layer[taken]] = format[taken]
    return found, float(answer.mip_dual_bound or 0.0) / scale


@contextmanager
def _without_stdout() -> Iterator[None]:
    """Silence stdout: HiGHS 1.12 prints a leftover debug line with C's printf, even without `disp`, and breaks JSON."""
    try:
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no stdout
        yield
        return
    sys.stdout.flush()
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # flush what C still buffers into the current stdout
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
