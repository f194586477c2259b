"""Policies to start a study from, in addition to the exact solution."""

from __future__ import annotations

import numpy as np

from bitpolicy.search.knapsack import Solution
from bitpolicy.search.problem import Problem
from bitpolicy.search.quadratic import QuadraticForm, feasible, repair


def repaired(problem: Problem, exact: Solution, vectors: int) -> Solution | None:
    """The exact solution, repaired for how layers' errors add up and cancel.

    Args:
        problem: the search problem.
        exact: its solution for errors that add up as powers.
        vectors: probe vectors per sample; their sketches are consecutive in the table.

    Returns:
        None if the table has no sketches, if the sketches predict held-out samples no better than the powers do, or if
        there is nothing to repair.
    """
    table = problem.table
    if table.sketches is None or len(table.sketches) < 4:
        return None
    packed = [table.formats.index(f) if f.packed else -1 for f in problem.formats]
    padded = np.concatenate([table.sketches.numpy(), np.zeros((*table.sketches.shape[:2], 1), np.float32)], axis=2)
    sketches = np.stack([problem.merged(sketch[:, packed]) for sketch in padded])
    error, sizes = problem.merged(problem.errors()), problem.merged(problem.sizes())
    budget = problem.budget - problem.account.fixed
    groups = [sketch // vectors for sketch in range(len(sketches))]
    form = QuadraticForm.of(sketches, error, groups, feasible(error, sizes, budget))
    if form.shrinkage == 0:
        return None
    merged = Solution(np.array([exact.formats[row[0]] for row in problem.rows()]), exact.error, exact.nbytes, exact.gap)
    found = problem.spread(repair(form, sizes, budget, merged))
    return None if np.array_equal(found.formats, exact.formats) else found
