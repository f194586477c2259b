"""Which estimates are measured before a solution is trusted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitpolicy.search.closeness import beyond_first_order, close_choices
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.table import FIRST_ORDER, SensitivityTable


def with_errors(problem: Problem, error: torch.Tensor, sketches: int = 32) -> Problem:
    """The problem with other errors, as if from this many sketches."""
    signs = torch.randn(sketches, *error.shape, generator=torch.Generator().manual_seed(0)).sign()
    table = replace(problem.table, probe="adjoint", error=error, sketches=signs * error.sqrt().float())
    return replace(problem, table=table)


@pytest.fixture
def small(problem: Problem) -> Problem:
    """All errors within first order, and each layer's two formats far apart."""
    return with_errors(problem, problem.table.error * 0.1 * FIRST_ORDER)


def chosen_places(problem: Problem) -> set[tuple[int, int]]:
    formats = [problem.formats[i] for i in problem.solve().formats]
    return {(i, problem.table.formats.index(f)) for i, f in enumerate(formats) if f.packed}


def test_the_largest_chosen_errors_come_first(small: Problem) -> None:
    error = small.table.error * 100
    problem = with_errors(small, error)
    large = sorted((p for p in chosen_places(problem) if error[p] > FIRST_ORDER), key=lambda p: -float(error[p]))
    assert len(large) > 4
    assert beyond_first_order(problem, problem.solve(), 4) == large[:4]
    assert beyond_first_order(problem, problem.solve(), 0) == []


def test_errors_within_first_order_are_trusted(small: Problem) -> None:
    assert beyond_first_order(small, small.solve(), 1000) == []


def test_close_choices_are_found_and_clear_ones_are_not(small: Problem) -> None:
    """The more sketches, the fewer choices depend on an estimate's error."""
    solution = small.solve()
    many = close_choices(with_errors(small, small.table.error, sketches=2), solution, 1000)
    few = close_choices(with_errors(small, small.table.error, sketches=20000), solution, 1000)
    assert set(few) < set(many)
    assert 2 * len(few) < len(many)


def test_at_most_count_places_and_none_twice(small: Problem) -> None:
    problem = with_errors(small, small.table.error, sketches=2)
    found = close_choices(problem, problem.solve(), 5)
    assert len(found) == len(set(found)) == 5
    measured = problem.table.remeasured({place: float(problem.table.error[place]) for place in found})
    again = replace(problem, table=measured)
    assert set(close_choices(again, again.solve(), 5)).isdisjoint(found)
    assert close_choices(problem, problem.solve(), 0) == []


def test_every_place_is_in_the_table(small: Problem) -> None:
    table: SensitivityTable = small.table
    problem = with_errors(small, table.error, sketches=2)
    for layer, column in close_choices(problem, problem.solve(), 1000):
        assert 0 <= layer < len(table.layers)
        assert 0 <= column < len(table.formats)
