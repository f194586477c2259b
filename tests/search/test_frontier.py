"""The frontier of bytes against error, and its inverse, against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.budget import BudgetError
from bitpolicy.search.frontier import frontier, points, smallest
from bitpolicy.search.hull import Hull, total
from bitpolicy.search.knapsack import Solution, solve, solve_hull

GAP = 1e-4
Case = tuple[np.ndarray, np.ndarray]


def cases(count: int, seed: int) -> Iterator[Case]:
    """Small tables: ties, zero errors, errors near 1e-12, equal sizes, disallowed formats, sizes of gigabytes."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        shape = (int(draw.integers(1, 6)), int(draw.integers(1, 5)))
        error = draw.exponential(size=shape) ** 3 * (1.0, 1e-12, 1e3)[i % 3]
        if i % 4 == 0:
            error[:, draw.integers(shape[1])] = 0.0
        if i % 5 == 0:
            error = np.ceil(error)
        away = draw.random(shape) < 0.3 * (i % 2)
        away[np.arange(shape[0]), draw.integers(0, shape[1], size=shape[0])] = False
        yield np.where(away, np.inf, error), draw.integers(1, (3, 1000, 10**10)[i % 7 % 3], size=shape)


def everything(error: np.ndarray, nbytes: np.ndarray) -> Case:
    """Errors and bytes of all allowed choices."""
    allowed = [row.nonzero()[0] for row in np.isfinite(error)]
    choices = [np.array(choice) for choice in itertools.product(*allowed)]
    return np.array([total(error, c) for c in choices]), np.array([total(nbytes, c) for c in choices])


def check(solution: Solution, error: np.ndarray, nbytes: np.ndarray) -> None:
    assert solution.nbytes == total(nbytes, solution.formats)
    assert solution.error == pytest.approx(float(total(error, solution.formats)), rel=1e-12)
    assert 0 <= solution.gap <= 1


def many(layers: int = 80, formats: int = 5, seed: int = 0) -> Case:
    draw = np.random.default_rng(seed)
    bits = np.linspace(2, 16, formats)
    nbytes = (draw.integers(100, 100_000, size=(layers, 1)) * bits).astype(np.int64)
    error = draw.lognormal(0, 2, size=(layers, 1)) * 4.0**-bits * draw.lognormal(0, 0.5, size=(layers, formats))
    return error, nbytes


# The frontier


@pytest.mark.parametrize("seed", range(5))
def test_each_budget_gets_the_least_possible_error(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for error, nbytes in cases(60, seed):
        errors, sizes = everything(error, nbytes)
        budgets = [int(draw.choice(sizes)) + int(draw.integers(0, 2)) for _ in range(6)]
        for budget, solution in zip(budgets, frontier(error, nbytes, budgets), strict=True):
            check(solution, error, nbytes)
            best = errors[sizes <= budget].min()
            assert solution.nbytes <= budget
            assert solution.error <= best * (1 + GAP) + 1e-13 * errors.max()
            assert solution.error * (1 - solution.gap) <= best * (1 + 1e-9)


@pytest.mark.parametrize("gap", [1e-4, 0.3])
def test_more_bytes_never_have_more_error(gap: float) -> None:
    for seed in range(4):
        error, nbytes = many(seed=seed)
        budgets = np.linspace(nbytes[:, 0].sum(), nbytes[:, -1].sum(), 20).astype(int).tolist()
        found = frontier(error, nbytes, budgets, gap=gap)
        assert all(more.error <= less.error for less, more in itertools.pairwise(found))
        assert max(solution.gap for solution in found) <= gap * 1.01


def test_more_bytes_never_have_more_error_when_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first budget has unlimited time, the others none."""

    asked: list[int] = []

    def hurried(hull: Hull, budget: int, gap: float, seconds: float, known: np.ndarray | None) -> Solution:
        asked.append(budget)
        return solve_hull(hull, budget, gap, 0.0 if len(asked) % 2 == 0 else seconds, known)

    monkeypatch.setitem(frontier.__globals__, "solve_hull", hurried)
    worse = 0
    for seed in range(4):
        error, nbytes = many(seed=seed)
        budget = int(nbytes[:, -1].sum() * 0.4)
        first, second = frontier(error, nbytes, [budget, budget + 1], gap=0.0)
        assert second.error <= first.error
        worse += solve_hull(Hull.of(error, nbytes), budget + 1, 0.0, 0.0).error > first.error
    assert worse, "in none of the cases the time was needed"


def test_the_solver_stops_at_the_gap_and_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    error, nbytes = many()
    budget = int(nbytes[:, -1].sum() * 0.4)
    monkeypatch.setitem(solve_hull.__globals__, "_highs", lambda *arguments: pytest.fail("HiGHS was asked"))
    for end in ({"gap": 0.3}, {"gap": 0.0, "seconds": 0.0}):
        (solution,) = frontier(error, nbytes, [budget], **end)
        back = smallest(error, nbytes, solution.error * 1.01, **end)
        assert 0 < solution.gap < 0.3
        assert 0 < back.gap < 0.3
    with pytest.raises(pytest.fail.Exception):
        frontier(error, nbytes, [budget], gap=0.0)
    with pytest.raises(pytest.fail.Exception):
        smallest(error, nbytes, solution.error * 1.01, gap=0.0)


def test_solutions_come_in_the_order_of_the_budgets() -> None:
    error, nbytes = many()
    low, high = int(nbytes[:, 0].sum()), int(nbytes[:, -1].sum())
    budgets = [high, low, (low + high) // 2, low]
    assert [s.nbytes <= b for s, b in zip(frontier(error, nbytes, budgets), budgets, strict=True)] == [True] * 4
    first, _, third, fourth = frontier(error, nbytes, budgets)
    assert first.error < third.error < fourth.error


def test_gaps_are_valid_without_any_time() -> None:
    for error, nbytes in cases(60, seed=9):
        errors, sizes = everything(error, nbytes)
        budget = int(np.median(sizes))
        (solution,) = frontier(error, nbytes, [budget], gap=0.0, seconds=0.0)
        assert solution.error * (1 - solution.gap) <= errors[sizes <= budget].min() * (1 + 1e-12)


def test_a_budget_below_the_smallest_policy_is_refused_with_that_size() -> None:
    with pytest.raises(BudgetError, match="smallest policy, 7 bytes"):
        frontier(np.array([[1.0, np.inf, 0.0]]), np.array([[7, 1, 9]]), [8, 6])


# The hull


@pytest.mark.parametrize("seed", range(5))
def test_each_point_of_the_hull_is_exact_for_its_bytes(seed: int) -> None:
    for error, nbytes in cases(60, seed):
        errors, sizes = everything(error, nbytes)
        found = points(error, nbytes)
        for point in found:
            check(point, error, nbytes)
            assert point.gap == 0
            assert point.error <= errors[sizes <= point.nbytes].min() + 1e-14 * errors.max()
        assert found[0].nbytes == sizes.min()
        assert found[-1].error == pytest.approx(errors.min(), rel=1e-12)


def test_the_hull_is_convex() -> None:
    found = points(*many())
    bought = np.diff([p.nbytes for p in found])
    saved = -np.diff([p.error for p in found])
    assert len(found) > 100
    assert (bought > 0).all()
    assert (np.diff(saved / bought) <= 1e-9 * saved[0] / bought[0]).all()


def test_layers_with_equal_rates_form_one_edge_of_the_hull() -> None:
    error, nbytes = np.array([[5.0, 1.0], [5.0, 1.0], [3.0, 0.0]]), np.array([[2, 4], [2, 4], [1, 7]])
    assert [(p.nbytes, p.error) for p in points(error, nbytes)] == [(5, 13.0), (9, 5.0), (15, 2.0)]


# The inverse


@pytest.mark.parametrize("seed", range(5))
def test_the_fewest_bytes_within_an_error(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for error, nbytes in cases(60, seed):
        errors, sizes = everything(error, nbytes)
        for target in (*draw.choice(errors, size=4), errors.min(), errors.max(), float(errors.mean())):
            solution = smallest(error, nbytes, float(target))
            check(solution, error, nbytes)
            best = sizes[errors <= target].min()
            assert solution.error <= target
            assert solution.nbytes <= best * (1 + GAP), (error, nbytes, target)
            assert solution.nbytes * (1 - solution.gap) <= best * (1 + 1e-12)


def test_the_inverse_of_a_solution_takes_no_more_bytes() -> None:
    error, nbytes = many()
    for share in (0.2, 0.4, 0.6, 0.8):
        there = solve(error, nbytes, int(nbytes[:, -1].sum() * share))
        back = smallest(error, nbytes, there.error)
        assert back.error <= there.error
        assert back.nbytes <= there.nbytes * (1 + GAP)
        assert back.gap <= GAP * 1.01


def test_the_gap_of_the_inverse_is_valid_without_any_time() -> None:
    worse = 0
    for seed in range(6):
        error, nbytes = many(seed=seed)
        target = solve(error, nbytes, int(nbytes[:, -1].sum() * 0.4)).error * 1.01
        found, best = (smallest(error, nbytes, target, gap=0.0, seconds=s) for s in (0.0, 60.0))
        check(found, error, nbytes)
        assert best.gap < 1e-7
        assert found.nbytes * (1 - found.gap) <= best.nbytes * (1 + 1e-12)
        worse += found.nbytes > best.nbytes
    assert worse, "in none of the cases the time was needed"


def test_an_unlimited_error_gives_the_smallest_policy() -> None:
    error, nbytes = np.array([[np.inf, 3.0, 0.0], [5.0, 1.0, 0.0]]), np.array([[1, 2, 4], [1, 2, 4]])
    for target in (8.0, 1e30, np.inf):
        assert smallest(error, nbytes, target).formats.tolist() == [1, 0]


def test_a_zero_error_gives_the_smallest_exact_policy() -> None:
    solution = smallest(np.array([[1.0, 0.0, 0.0], [1e-30, 0.5, 0.0]]), np.array([[1, 4, 3], [1, 2, 4]]), 0.0)
    assert (solution.formats.tolist(), solution.nbytes, solution.gap) == ([2, 2], 7, 0.0)


@pytest.mark.parametrize("target", [0.2, -1.0, np.nan])
def test_an_unreachable_error_is_refused_with_the_smallest_one(target: float) -> None:
    with pytest.raises(BudgetError, match=r"any policy has, 0\.75; raise the target"):
        smallest(np.array([[np.inf, 0.25], [0.5, 0.5]]), np.ones((2, 2), dtype=np.int64), target)


def test_a_layer_without_an_allowed_format_is_named() -> None:
    for ask in (lambda e, b: frontier(e, b, [9]), lambda e, b: smallest(e, b, 9.0), points):
        with pytest.raises(BitPolicyError, match=r"layer 0 .* --formats"):
            ask(np.array([[np.inf, np.inf]]), np.array([[1, 2]]))
