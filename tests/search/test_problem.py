"""Pinned layers, shared formats and barred formats, against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.search.budget import BudgetError
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.table import SensitivityTable

INT4, INT8 = format_named("int4"), format_named("int8")
FORMATS = (INT4, INT8, FP16)
SHAPES = {"a": (16, 64), "b": (32, 64), "c": (8, 128), "d": (64, 32), "e": (24, 96)}


@pytest.fixture(params=range(4))
def problem(request: pytest.FixtureRequest) -> Problem:
    draw = torch.Generator().manual_seed(request.param)
    error = torch.rand(len(SHAPES), 2, generator=draw, dtype=torch.float64)
    error[:, 1] /= 40
    layers = [Layer(name, "Linear", shape, True, "other", "ends") for name, shape in SHAPES.items()]
    table = SensitivityTable("ablation", tuple(SHAPES), FORMATS[:2], error, torch.zeros(len(SHAPES), 2).bool())
    account = ByteAccount(torch.float16, SHAPES, fixed=100, parameters=9000)
    return Problem(layers, FORMATS, account, table=table, budget=account.reference // 2)


def every_policy(problem: Problem) -> Iterator[tuple[float, int, dict[str, str]]]:
    """Error, bytes and formats of each allowed policy, from the definitions alone."""
    names = [layer.name for layer in problem.inventory]
    for formats in itertools.product(FORMATS, repeat=len(names)):
        chosen = dict(zip(names, formats, strict=True))
        if any(chosen[name] != format for name, format in problem.pinned.items()):
            continue
        if any(len({chosen[name] for name in group}) > 1 for group in problem.tied):
            continue
        if any((name, format) in problem.barred for name, format in chosen.items()):
            continue
        error = sum(problem.table.score(i, f) for i, f in enumerate(formats))
        yield error, problem.account.total(chosen), {name: f.name for name, f in chosen.items()}


CONSTRAINTS = [
    {},
    {"pinned": {"b": INT8}},
    {"tied": [["a", "c", "e"]]},
    {"tied": [["e", "a"], ["d", "b"]], "pinned": {"a": INT4, "e": INT4}},
    {"barred": frozenset({("b", INT4), ("d", FP16)}), "tied": [["b", "c"]]},
]


@pytest.mark.parametrize(
    "constraints", CONSTRAINTS, ids=["free", "pinned", "tied", "tied and pinned", "barred and tied"]
)
def test_the_solution_is_the_best_allowed_policy(problem: Problem, constraints: dict) -> None:
    problem = replace(problem, **constraints)
    allowed = list(every_policy(problem))
    best = min(error for error, nbytes, _ in allowed if nbytes <= problem.budget)
    solution = problem.solve()
    formats = {name: choice.format for name, choice in problem.choices(solution).items()}
    assert {name: f.name for name, f in formats.items()} in [chosen for *_, chosen in allowed]
    assert solution.error == pytest.approx(best, rel=2e-4)
    assert problem.account.total(formats) == solution.nbytes + problem.account.fixed <= problem.budget


@pytest.mark.parametrize(
    "constraints", CONSTRAINTS, ids=["free", "pinned", "tied", "tied and pinned", "barred and tied"]
)
def test_the_smallest_policy_has_the_reported_size(problem: Problem, constraints: dict) -> None:
    problem = replace(problem, **constraints)
    smallest = min(nbytes for _, nbytes, _ in every_policy(problem))
    assert problem.smallest == smallest
    assert problem.solve(budget=smallest).nbytes + problem.account.fixed == smallest
    with pytest.raises(BudgetError):
        problem.solve(budget=smallest - 1)


@pytest.mark.parametrize(
    "constraints", CONSTRAINTS, ids=["free", "pinned", "tied", "tied and pinned", "barred and tied"]
)
def test_the_fewest_bytes_of_an_error_are_found(problem: Problem, constraints: dict) -> None:
    problem = replace(problem, **constraints)
    allowed = sorted(every_policy(problem), key=lambda policy: policy[0])
    for error, _, _ in allowed[:: max(1, len(allowed) // 7)]:
        fewest = min(nbytes for other, nbytes, _ in allowed if other <= error * (1 + 1e-12))
        assert problem.smallest_within(error * (1 + 1e-12)).nbytes + problem.account.fixed <= fewest * (1 + 2e-4)


def test_the_frontier_is_the_solution_for_each_size(problem: Problem) -> None:
    budgets = np.linspace(problem.smallest, problem.account.reference, 9).astype(int).tolist()
    for budget, found in zip(budgets, problem.frontier(budgets), strict=True):
        assert found.error == pytest.approx(problem.solve(budget=budget).error, rel=3e-4, abs=1e-15)


def test_keeping_a_format_that_is_not_a_candidate_is_refused(problem: Problem) -> None:
    with pytest.raises(BitPolicyError, match="a is kept at int3, which is no candidate; add int3 to --formats"):
        replace(problem, pinned={"a": format_named("int3")})
