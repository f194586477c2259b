"""The exact solver against brute force, and its errors when nothing fits."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.budget import BudgetError
from bitpolicy.search.hull import Hull, total
from bitpolicy.search.knapsack import Solution, least, solve

GAP = 1e-4  # allowed optimality gap


def best_of_all(error: np.ndarray, nbytes: np.ndarray, budget: int) -> float:
    """The least total error of all choices that fit, by brute force."""
    rows = range(len(error))
    return min(
        sum(float(error[i, f]) for i, f in zip(rows, choice, strict=True))
        for choice in itertools.product(range(error.shape[1]), repeat=len(error))
        if sum(int(nbytes[i, f]) for i, f in zip(rows, choice, strict=True)) <= budget
    )


def instances(count: int, seed: int, largest: int = 1000) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Small random problems. Every third has a format without error; the budget often equals a choice's size."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        shape = (draw.integers(1, 6), draw.integers(1, 5))
        error = draw.exponential(size=shape) ** 3
        if i % 3 == 0:
            error[:, draw.integers(shape[1])] = 0.0
        nbytes = draw.integers(1, largest, size=shape)
        some = nbytes[np.arange(shape[0]), draw.integers(0, shape[1], size=shape[0])].sum()
        budget = max(int(some) + int(draw.integers(-1, 2)), int(nbytes.min(axis=1).sum()))
        yield error, nbytes, budget


def check(solution: Solution, error: np.ndarray, nbytes: np.ndarray, budget: int) -> None:
    """The stated properties of a solution are true."""
    rows = np.arange(len(error))
    assert solution.formats.shape == rows.shape
    assert solution.nbytes == int(nbytes[rows, solution.formats].sum()) <= budget
    assert solution.error == pytest.approx(float(error[rows, solution.formats].sum()), rel=1e-12)
    assert 0 <= solution.gap <= 1


@pytest.mark.parametrize("magnitude", [1.0, 1e-5, 1e-9, 1e-12, 1e-30, 1e9, 1e30], ids=str)
def test_no_choice_that_fits_has_less_error(magnitude: float) -> None:
    for error, nbytes, budget in instances(60, seed=1):
        solution = solve(error * magnitude, nbytes, budget)
        check(solution, error * magnitude, nbytes, budget)
        best = best_of_all(error, nbytes, budget) * magnitude
        assert solution.error <= best * (1 + GAP) + 1e-13 * magnitude, (error, nbytes, budget)
        assert solution.error * (1 - solution.gap) <= best * (1 + 1e-9)  # the certified gap holds


@pytest.mark.parametrize("spread", [1, 4, 7])
def test_errors_may_span_many_orders_of_magnitude(spread: int) -> None:
    draw = np.random.default_rng(spread)
    for error, nbytes, budget in instances(60, seed=2):
        wide = error * 10.0 ** draw.uniform(-spread, 0, size=error.shape)
        best = best_of_all(wide, nbytes, budget)
        assert solve(wide, nbytes, budget).error <= best * (1 + GAP) + 1e-13 * wide.max()


def test_layers_of_gigabytes_are_solved_exactly_to_the_byte() -> None:
    worse = []
    for error, nbytes, budget in instances(240, seed=3, largest=10**10):
        found, best = solve(error, nbytes, budget).error, best_of_all(error, nbytes, budget)
        if found > best * (1 + GAP) + 1e-13:
            worse.append(found / best)
    assert worse == []


def test_ties_give_the_same_error() -> None:
    for error, nbytes, budget in instances(60, seed=4, largest=4):
        rough = np.ceil(error)
        solution = solve(rough, nbytes, budget)
        check(solution, rough, nbytes, budget)
        assert solution.error == best_of_all(rough, nbytes, budget)


def test_with_zero_errors_any_fitting_choice_is_accepted() -> None:
    error, nbytes = np.zeros((3, 3)), np.array([[1, 2, 4]] * 3)
    for budget in (3, 5, 12, 100):
        check(solve(error, nbytes, budget), error, nbytes, budget)


def test_with_zero_errors_the_order_of_formats_does_not_matter() -> None:
    error, nbytes = np.zeros((2, 2)), np.array([[4, 2], [4, 2]])
    check(solve(error, nbytes, 5), error, nbytes, 5)


def test_a_large_budget_gives_every_layer_its_best_format() -> None:
    error = np.array([[3.0, 1.0, 0.0], [2.0, 0.0, 0.5]])
    nbytes = np.array([[1, 2, 4], [1, 2, 4]])
    solution = solve(error, nbytes, 6)
    assert solution.formats.tolist() == [2, 1]
    assert (solution.error, solution.nbytes, solution.gap) == (0.0, 6, 0.0)


def test_the_smallest_of_equally_good_formats_is_chosen() -> None:
    solution = solve(np.array([[1.0, 0.0, 0.0]]), np.array([[1, 4, 2]]), 100)
    assert (solution.formats.tolist(), solution.nbytes) == ([2], 2)


def test_a_budget_of_exactly_the_smallest_size_is_enough() -> None:
    for error, nbytes, _ in instances(30, seed=5):
        smallest = int(nbytes.min(axis=1).sum())
        assert solve(error, nbytes, smallest).nbytes == smallest


def test_one_byte_below_the_smallest_size_is_refused() -> None:
    nbytes = np.array([[1_000_000, 2_000_000], [705_001, 2_000_000]])
    with pytest.raises(BudgetError, match=r"1,705,000 bytes for the layers .* smallest policy, 1,705,001 bytes"):
        solve(np.ones((2, 2)), nbytes, 1_705_000)


def unet_like(layers: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors and bytes like those of a U-Net: INT4, INT8 and FP16, sizes over three orders of magnitude."""
    draw = np.random.default_rng(seed)
    weights = draw.choice([256, 4096, 9216, 36_864, 147_456, 589_824], size=layers)
    nbytes = np.stack([weights // 2 + weights // 64 * 3, weights + 256, weights * 2], axis=1)
    int4 = draw.lognormal(0, 2, size=layers) * 1e-4
    return np.stack([int4, int4 * draw.lognormal(-5, 1, size=layers), np.zeros(layers)], axis=1), nbytes


def test_more_bytes_never_give_more_error() -> None:
    error, nbytes = unet_like(60, seed=0)
    budgets = np.linspace(nbytes[:, 0].sum(), nbytes[:, 2].sum(), 25).astype(int)
    found = [solve(error, nbytes, int(budget)).error for budget in budgets]
    assert all(later <= earlier * (1 + GAP) for earlier, later in itertools.pairwise(found))
    assert found[-1] == 0.0
    assert found[0] == pytest.approx(float(error[:, 0].sum()))


def test_a_budget_of_exactly_a_solutions_size_finds_it_again() -> None:
    error, nbytes = unet_like(40, seed=1)
    for share in (0.3, 0.4, 0.5, 0.7):
        solution = solve(error, nbytes, int(nbytes[:, 2].sum() * share))
        again = solve(error, nbytes, solution.nbytes)
        assert again.error <= solution.error * (1 + GAP)


def test_the_requested_gap_is_certified() -> None:
    for seed in range(3):
        error, nbytes = unet_like(80, seed)
        for share in (0.3, 0.45):
            assert solve(error, nbytes, int(nbytes[:, 2].sum() * share)).gap <= GAP * 1.01


def best_of_each_budget(error: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    """The least total error within 0, 1, 2, ... bytes, by dynamic programming over whole bytes."""
    best = np.zeros(int(nbytes.max(axis=1).sum()) + 1)
    for errors, sizes in zip(error, nbytes, strict=True):
        later = [
            np.concatenate([np.full(b, np.inf), best[: len(best) - b]]) + e for e, b in zip(errors, sizes, strict=True)
        ]
        best = np.min(later, axis=0)
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_many_layers_are_solved_as_well_as_by_dynamic_programming(seed: int, noise: float) -> None:
    """Errors are nearly proportional to bytes, so exchanges of two layers are not enough."""
    draw = np.random.default_rng(seed)
    nbytes = draw.integers(20, 60, size=(30, 4))
    error = (60 - nbytes) * draw.uniform(1 - noise, 1 + noise, size=nbytes.shape)
    error[draw.random(nbytes.shape) < 0.1] = np.inf
    error[:, 0] = (60 - nbytes)[:, 0]
    best = best_of_each_budget(error, nbytes)
    smallest = int(np.where(np.isfinite(error), nbytes, 60).min(axis=1).sum())
    for budget in range(smallest, int(nbytes.max(axis=1).sum()), 29):
        for gap in (GAP, 0.0):
            solution = solve(error, nbytes, budget, gap)
            check(solution, error, nbytes, budget)
            assert solution.error <= best[budget] * (1 + gap) + 1e-6
            assert solution.error * (1 - solution.gap) <= best[budget] * (1 + 1e-9)
            assert solution.gap <= gap + 1e-8


# Formats that a layer may not have


def barred(count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Problems in which a third of the errors are infinite, but never a whole layer's, with ties and equal sizes."""
    draw = np.random.default_rng(seed)
    for i, (error, nbytes, _) in enumerate(instances(count, seed, largest=(5, 1000, 10**9)[seed % 3])):
        error = np.ceil(error) if i % 4 == 0 else error
        kept = draw.integers(0, error.shape[1], size=len(error))
        away = draw.random(error.shape) < 1 / 3
        away[np.arange(len(error)), kept] = False
        least = np.where(away, 10**12, nbytes).min(axis=1).sum()
        some = nbytes[np.arange(len(error)), kept].sum()
        yield np.where(away, np.inf, error), nbytes, max(int(some) + int(draw.integers(-1, 2)), int(least))


@pytest.mark.parametrize("magnitude", [1.0, 1e-12, 1e12], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_disallowed_formats_are_never_chosen(seed: int, magnitude: float) -> None:
    for error, nbytes, budget in barred(60, seed):
        solution = solve(error * magnitude, nbytes, budget)
        check(solution, error * magnitude, nbytes, budget)
        best = best_of_all(error, nbytes, budget) * magnitude
        assert solution.error <= best * (1 + GAP) + 1e-13 * magnitude, (error, nbytes, budget)
        assert solution.error * (1 - solution.gap) <= best * (1 + 1e-9)


def test_the_smallest_size_counts_only_allowed_formats() -> None:
    error, nbytes = np.array([[np.inf, 1.0, 0.0], [1.0, np.inf, 0.0]]), np.array([[1, 20, 40], [1, 2, 4]])
    assert solve(error, nbytes, 21).formats.tolist() == [1, 0]
    with pytest.raises(BudgetError, match=r"20 bytes for the layers .* smallest policy, 21 bytes"):
        solve(error, nbytes, 20)


def test_a_layer_without_an_allowed_format_is_named() -> None:
    error = np.array([[1.0, 0.0], [np.inf, np.inf]])
    with pytest.raises(BitPolicyError, match=r"layer 1 .* --formats"):
        solve(error, np.ones((2, 2), dtype=np.int64), 10)


@pytest.mark.parametrize("wrong", [np.nan, -1.0, -np.inf])
def test_an_invalid_error_power_is_refused(wrong: float) -> None:
    with pytest.raises(BitPolicyError, match=r"error power.*bitpolicy probe"):
        solve(np.array([[1.0, wrong]]), np.array([[1, 2]]), 10)


# The relaxation


@pytest.mark.parametrize("seed", range(6))
def test_the_lagrangian_bound_is_below_the_best_and_its_choice_fits(seed: int) -> None:
    for error, nbytes, budget in itertools.chain(barred(60, seed), instances(60, seed)):
        choice, bound, reduced = Hull.of(error, nbytes).relaxed(budget)
        assert total(nbytes, choice) <= budget
        assert np.isfinite(total(error, choice))
        assert bound <= best_of_all(error, nbytes, budget) * (1 + 1e-12)
        assert not np.isnan(reduced).any()


@pytest.mark.parametrize("seed", range(3))
def test_reduced_costs_bound_every_choice_with_a_column(seed: int) -> None:
    for error, nbytes, budget in barred(40, seed):
        _, bound, reduced = Hull.of(error, nbytes).relaxed(budget)
        for layer, format in zip(*np.isfinite(error).nonzero(), strict=True):
            pinned = error.copy()
            pinned[layer, np.arange(error.shape[1]) != format] = np.inf
            if np.where(np.isfinite(pinned), nbytes, 10**12).min(axis=1).sum() <= budget:
                assert bound + reduced[layer, format] <= best_of_all(pinned, nbytes, budget) * (1 + 1e-12) + 1e-12


def test_without_time_the_relaxed_choice_has_a_valid_gap() -> None:
    for error, nbytes, budget in barred(60, seed=1):
        choice, bound = least(Hull.of(error, nbytes), budget, gap=0.0, seconds=0.0)
        assert total(nbytes, choice) <= budget
        assert bound * (1 - 1e-12) <= best_of_all(error, nbytes, budget) <= total(error, choice) * (1 + 1e-12)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS prints on these problems with C's printf, which bypasses sys.stdout and is buffered until a flush."""
    draw, bits = np.random.default_rng(0), np.array([2.25, 3.25, 4.25, 4.5, 5.25, 6.25, 8, 16])
    sizes = [102_400, 409_600, 1_638_400, 6_553_600, 11_520, 3_686_400, 14_745_600, 1_310_720]
    nbytes = np.round(draw.choice(sizes, size=(100, 1)) * bits / 8).astype(np.int64)
    error = draw.lognormal(-8, 2, size=(100, 1)) * 4.0 ** (4 - bits) * draw.lognormal(0, 0.5, size=(100, 8))
    for share in (0.2, 0.35, 0.4):
        solve(error, nbytes, int(nbytes[:, -1].sum() * share))
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("", "")
