"""Whether it helps to know how layers' errors add up: the adjoint's additive scores against its quadratic form.

Both use the same table and start from the same exact solution. Swap repair minimizes E(z) = (1 - lambda) A(z) + lambda
Q(z) (`bitpolicy.search.quadratic`). lambda is the value that held-out samples support, as in bitpolicy, or given. At 1
the sketches are taken at face value.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from peers.entry import SHARES, Entry
from peers.rivals import Rivals

from bitpolicy.search.problem import Problem
from bitpolicy.search.quadratic import QuadraticForm, feasible, repair

GIVEN = (0.1, 0.3, 1.0)


def quadratic(rivals: Rivals) -> Iterator[Entry]:
    """Entries at every size for every lambda."""
    for share, shrinkage in itertools.product(SHARES, (None, *GIVEN)):
        plan = rivals.plan
        problem = Problem(
            plan.layers, plan.formats, plan.account, table=rivals.ours, budget=int(share * plan.account.reference)
        )
        formats, used = _repaired(problem, shrinkage, rivals.vectors)
        label = "asked" if shrinkage is None else f"{shrinkage:g}"
        chosen = {layer.name: plan.formats[f] for layer, f in zip(plan.layers, formats, strict=True)}
        yield rivals.write(f"adjoint quadratic #{label}", chosen, share, "ours", {"lambda": used})


def _repaired(problem: Problem, shrinkage: float | None, vectors: int) -> tuple[np.ndarray, float]:
    """The repaired policy, and the lambda that was used."""
    sketches = problem.table.sketches
    assert sketches is not None
    errors, sizes, budget = problem.errors(), problem.sizes(), problem.budget - problem.account.fixed
    columns = [problem.table.formats.index(f) for f in problem.formats if f.packed]
    groups = [sketch // vectors for sketch in range(len(sketches))]
    arguments = sketches.numpy()[:, :, columns], errors
    if shrinkage is None:
        form = QuadraticForm.of(*arguments, groups, feasible(errors, sizes, budget))
    else:
        form = QuadraticForm.fixed(*arguments, shrinkage)
    return repair(form, sizes, budget, problem.solve()).formats, form.shrinkage
