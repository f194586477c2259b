"""The quadratic form against its formula, its shrinkage against held-out samples, repair against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.budget import BudgetError
from bitpolicy.search.hull import total
from bitpolicy.search.knapsack import Solution, solve
from bitpolicy.search.quadratic import QuadraticForm, feasible, repair

Case = tuple[QuadraticForm, np.ndarray, int]


def by_formula(sketches: np.ndarray, error: np.ndarray, shrinkage: float, policy: np.ndarray) -> float:
    """E of one policy. Sketches have shape (R, layers, formats)."""
    alone = sum(float(error[i, f]) for i, f in enumerate(policy))
    vectors = [sum(float(sketch[i, f]) for i, f in enumerate(policy)) for sketch in sketches]
    return (1 - shrinkage) * alone + shrinkage * sum(v * v for v in vectors) / len(vectors)


def cases(count: int, seed: int) -> Iterator[Case]:
    """Small problems: layers that add up and cancel, ties, no error, errors near 1e-12, disallowed formats."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        layers, formats, sketches = int(draw.integers(1, 7)), int(draw.integers(1, 4)), int(draw.integers(1, 6))
        s = draw.standard_normal((sketches, layers, formats)) * (1.0, 1e-6, 100.0)[i % 3]
        if i % 4 == 0:
            s[:, :, -1] = 0.0
        if i % 5 == 0:
            s = np.round(s)
        away = draw.random((layers, formats)) < 0.3 * (i % 2)
        kept = draw.integers(0, formats, size=layers)
        away[np.arange(layers), kept] = False
        error = np.where(away, np.inf, np.square(s).mean(axis=0))
        nbytes = draw.integers(1, (3, 1000, 10**10)[i % 7 % 3], size=(layers, formats))
        budget = int(nbytes[np.arange(layers), kept].sum()) + int(draw.integers(0, 2))
        yield QuadraticForm.fixed(s, error, (0.0, 0.3, 1.0, float(draw.random()))[i % 8 // 2]), nbytes, budget


def size(nbytes: np.ndarray, policy: np.ndarray) -> int:
    return int(nbytes[np.arange(len(policy)), policy].sum())


def neighbours(policy: np.ndarray, formats: int) -> Iterator[np.ndarray]:
    """All policies that differ in one or two layers."""
    for pair in itertools.combinations_with_replacement(range(len(policy)), 2):
        for new in itertools.product(range(formats), repeat=2):
            other = policy.copy()
            other[list(pair)] = new
            yield other


def unet_like(layers: int, sketches: int, seed: int, common: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sketches of (int4, int8), errors of (int4, int8, fp16) and bytes; two sketches per sample. `common` is the share
    of power that all layers have in one direction."""
    draw = np.random.default_rng(seed)
    size = draw.lognormal(0, 1, size=(layers, 1)) ** 0.5 * np.array([1.0, 0.06])
    shared, own = draw.standard_normal((sketches, 1, 1)), draw.standard_normal((sketches, layers, 2))
    s = (common**0.5 * shared + (1 - common) ** 0.5 * own) * size
    weights = draw.integers(100, 10_000, size=layers)
    error = np.concatenate([np.square(s).mean(axis=0), np.zeros((layers, 1))], axis=1)
    return s.astype(np.float32), error, np.stack([weights, 2 * weights, 4 * weights], axis=1)


# The form


@pytest.mark.parametrize("seed", range(3))
def test_the_value_equals_the_formula(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for form, _, _ in cases(60, seed):
        layers, formats = form.error.shape
        policies = draw.integers(0, formats, size=(9, layers))
        sketches = form.sketches.transpose(2, 0, 1)
        expected = [by_formula(sketches, form.error, min(form.shrinkage, 0.999), policy) for policy in policies]
        found = replace(form, shrinkage=min(form.shrinkage, 0.999)).value(policies)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12 * np.square(sketches).max())


def test_adding_vectors_alone_still_bars_formats() -> None:
    form = QuadraticForm.fixed(np.ones((2, 2, 2)), np.array([[np.inf, 1.0], [1.0, 1.0]]), 1.0)
    assert form.value(np.array([[0, 0], [1, 0]])).tolist() == [np.inf, 4.0]


def test_more_policies_than_one_batch_are_evaluated() -> None:
    s, error, _ = unet_like(layers=11, sketches=6, seed=0, common=0.5)
    form = QuadraticForm.fixed(s, error, 0.4)
    policies = np.random.default_rng(0).integers(0, 3, size=(1100, 11))
    one_by_one = [form.value(policy[None])[0] for policy in policies]
    np.testing.assert_allclose(form.value(policies), one_by_one, rtol=1e-12)


def test_fp16_is_added_as_the_last_format_without_error() -> None:
    s, error, _ = unet_like(layers=5, sketches=6, seed=0, common=0.5)
    with_it = np.concatenate([s, np.zeros((6, 5, 1), np.float32)], axis=2)
    policies = np.random.default_rng(0).integers(0, 3, size=(50, 5))
    short, full = (QuadraticForm.fixed(sketches, error, 0.7) for sketches in (s, with_it))
    assert short.value(policies).tolist() == full.value(policies).tolist()
    assert short.value(np.full((1, 5), 2)).tolist() == [0.0]


def test_with_one_layer_powers_and_vectors_are_the_same() -> None:
    s, error, _ = unet_like(layers=1, sketches=8, seed=3, common=0.5)
    for shrinkage in (0.0, 0.4, 1.0):
        found = QuadraticForm.fixed(s, error, shrinkage).value(np.array([[0], [1], [2]]))
        np.testing.assert_allclose(found, error[0], rtol=1e-6)


# The shrinkage


def held_out_loss(s: np.ndarray, groups: np.ndarray, policies: np.ndarray, shrinkage: float) -> list[float]:
    """For each sample, the mean squared relative error of the others' prediction, by the formula."""
    losses = []
    for sample in sorted(set(groups.tolist())):
        inside, outside = s[groups == sample], s[groups != sample]
        power = np.square(outside).mean(axis=0)
        errors = []
        for policy in policies:
            y = by_formula(inside, power, 1.0, policy)
            alone = by_formula(outside, power, 0.0, policy)
            errors.append((y - by_formula(outside, power, shrinkage, policy)) / alone)
        losses.append(float(np.square(errors).mean()))
    return losses


def chosen(s: np.ndarray, error: np.ndarray, nbytes: np.ndarray, seed: int = 0) -> float:
    policies = feasible(error, nbytes, int(nbytes[:, 2].sum() * 0.4), count=48, seed=seed)
    return QuadraticForm.of(s, error, np.arange(len(s)) // 2, policies).shrinkage


@pytest.mark.parametrize("common", [0.0, 0.02, 0.1, 0.5])
def test_held_out_samples_are_predicted_no_worse_than_by_powers_alone(common: float) -> None:
    for seed in range(6):
        s, error, nbytes = unet_like(layers=20, sketches=24, seed=seed, common=common)
        policies = feasible(error, nbytes, int(nbytes[:, 2].sum() * 0.4), count=12)
        groups = np.arange(24) // 2
        found = QuadraticForm.of(s, error, groups, policies).shrinkage
        wide = np.concatenate([s, np.zeros((24, 20, 1))], axis=2).astype(np.float64)
        assert 0 <= found <= 1
        assert np.mean(held_out_loss(wide, groups, policies, found)) <= np.mean(
            held_out_loss(wide, groups, policies, 0.0)
        )


def test_the_shrinkage_is_the_least_loss_less_one_standard_error() -> None:
    """The loss is a parabola: three points of it determine b and c of each sample."""
    s, error, nbytes = unet_like(layers=12, sketches=40, seed=1, common=0.3)
    policies = feasible(error, nbytes, int(nbytes[:, 2].sum() * 0.4), count=10)
    groups = np.arange(40) // 2
    wide = np.concatenate([s, np.zeros((40, 12, 1))], axis=2).astype(np.float64)
    zero, half, one = (np.array(held_out_loss(wide, groups, policies, x)) for x in (0.0, 0.5, 1.0))
    c = 2 * (one - 2 * half + zero)
    b = (zero + c - one) / 2
    found = QuadraticForm.of(s, error, groups, policies).shrinkage
    assert 0 < found < 1
    assert found == pytest.approx((b.mean() - b.std(ddof=1) / 20**0.5) / c.mean(), rel=1e-5)


def test_correlated_layers_are_detected_better_with_more_sketches() -> None:
    mean = {
        sketches: np.mean([chosen(*unet_like(60, sketches, seed, common=0.2)) for seed in range(8)])
        for sketches in (16, 64, 256)
    }
    assert mean[16] < mean[64] < mean[256]
    assert mean[256] > 0.6


def test_independent_layers_get_almost_no_shrinkage_weight() -> None:
    found = [chosen(*unet_like(60, 32, seed, common=0.0)) for seed in range(24)]
    assert np.median(found) == 0.0
    assert max(found) < 0.4


@pytest.mark.filterwarnings("error")  # no division by zero, and no mean of an empty set
def test_powers_are_added_if_nothing_can_be_held_out() -> None:
    s, error, nbytes = unet_like(layers=10, sketches=8, seed=0, common=0.9)
    policies = feasible(error, nbytes, int(nbytes[:, 2].sum() * 0.4), count=10)
    assert QuadraticForm.of(s, error, [0] * 8, policies).shrinkage == 0.0
    assert QuadraticForm.of(s, error, np.arange(8), np.full((3, 10), 2)).shrinkage == 0.0
    assert QuadraticForm.of(s * 0, error * 0, np.arange(8), policies).shrinkage == 0.0


@pytest.mark.filterwarnings("error")
def test_a_single_layer_gets_no_shrinkage_weight() -> None:
    s, error, _ = unet_like(layers=1, sketches=8, seed=0, common=0.5)
    assert QuadraticForm.of(s, error, np.arange(8) // 2, np.array([[0], [1]])).shrinkage == 0.0


@pytest.mark.filterwarnings("error")
def test_a_policy_that_quantizes_nothing_is_ignored() -> None:
    s, error, nbytes = unet_like(layers=30, sketches=64, seed=0, common=0.5)
    policies = feasible(error, nbytes, int(nbytes[:, 2].sum() * 0.4), count=16)
    nothing = np.full((1, 30), 2)
    groups = np.arange(64) // 2
    found = [QuadraticForm.of(s, error, groups, p).shrinkage for p in (policies, np.concatenate([nothing, policies]))]
    assert found[0] == found[1] > 0


def test_a_form_with_disallowed_formats_gets_a_shrinkage() -> None:
    s, error, nbytes = unet_like(layers=30, sketches=64, seed=0, common=0.5)
    error[::3, 0] = np.inf
    s[:, ::3, 0] = np.nan
    policies = feasible(error, nbytes, int(nbytes[:, 2].sum() * 0.45))
    form = QuadraticForm.of(s, error, np.arange(64) // 2, policies)
    assert 0 < form.shrinkage <= 1
    assert np.isfinite(form.value(policies)).all()


# Policies to judge by


def test_feasible_policies_fit_and_go_from_near_to_far() -> None:
    _, error, nbytes = unet_like(layers=60, sketches=8, seed=0, common=0.0)
    error[::4, 0] = np.inf
    budget = int(nbytes[:, 2].sum() * 0.45)
    policies = feasible(error, nbytes, budget, count=64)
    assert policies.shape == (64, 60)
    assert max(size(nbytes, policy) for policy in policies) <= budget
    assert np.isfinite(error[np.arange(60), policies]).all()
    distance = (policies != solve(error, nbytes, budget).formats).sum(axis=1)
    assert distance[:8].mean() < 6
    assert distance[-8:].mean() > 20
    assert np.array_equal(policies, feasible(error, nbytes, budget, count=64))
    assert not np.array_equal(policies, feasible(error, nbytes, budget, count=64, seed=1))


def test_feasible_policies_scale_each_format_separately() -> None:
    """The middle format is above the line between the others, so no factor per layer selects it."""
    error, nbytes = np.tile([4.0, 3.0, 0.0], (30, 1)), np.tile([1, 2, 3], (30, 1))
    policies = feasible(error, nbytes, budget=60, count=16)
    assert 1 not in solve(error, nbytes, 60).formats
    assert (policies[4:] == 1).any(axis=1).all()


# Repair


@pytest.mark.parametrize("columns", [256, 4, 1])
@pytest.mark.parametrize("seed", range(3))
def test_no_change_of_one_or_two_layers_improves_a_repaired_policy(
    seed: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of columns evaluated together."""
    monkeypatch.setitem(repair.__globals__, "_COLUMNS", columns)
    for form, nbytes, budget in cases(60, seed):
        start = solve(form.error, nbytes, budget)
        found = repair(form, nbytes, budget, start)
        assert found.nbytes == size(nbytes, found.formats) <= budget
        assert found.error == form.value(found.formats[None])[0] <= form.value(start.formats[None])[0]
        near = np.array(list(neighbours(found.formats, form.error.shape[1])))
        fit = near[[size(nbytes, policy) <= budget for policy in near]]
        rounding = 1e-12 * np.square(form.sketches).sum()
        assert form.value(fit).min() >= found.error * (1 - 1e-9) - rounding


@pytest.mark.parametrize("seed", range(3))
def test_the_gap_of_a_repaired_policy_is_valid(seed: int) -> None:
    for form, nbytes, budget in cases(40, seed):
        found = repair(form, nbytes, budget, solve(form.error, nbytes, budget))
        everything = np.array(list(itertools.product(range(form.error.shape[1]), repeat=len(form.error))))
        fit = everything[[size(nbytes, policy) <= budget for policy in everything]]
        assert 0 <= found.gap <= 1
        assert found.error * (1 - found.gap) <= form.value(fit).min() * (1 + 1e-9)


@pytest.mark.parametrize("columns", [1, 22])  # of 42, so that the last block is short
def test_earlier_blocks_are_visited_again(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts far from the optimum, at the smallest policy, with layers that add up and cancel."""
    monkeypatch.setitem(repair.__globals__, "_COLUMNS", columns)
    for seed in range(4):
        s, error, nbytes = unet_like(layers=14, sketches=4, seed=seed, common=0.9)
        s = s * np.where(np.random.default_rng(seed).random((1, 14, 2)) < 0.5, -1, 1)
        budget = int(nbytes[:, 2].sum() * 0.45)
        form, smallest = QuadraticForm.fixed(s, error, 1.0), np.zeros(14, dtype=np.int64)
        found = repair(form, nbytes, budget, Solution(smallest, 0.0, size(nbytes, smallest), 0.0))
        near = np.array(list(neighbours(found.formats, 3)))
        fit = near[[size(nbytes, policy) <= budget for policy in near]]
        assert form.value(fit).min() >= found.error * (1 - 1e-9)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 0.8])
def test_the_gap_is_the_shrinkage_for_uncorrelated_layers(shrinkage: float) -> None:
    """With a separate sketch for each layer, Q equals A; at a corner of the hull the bound is (1 - lambda) A."""
    layers = 6
    s = np.zeros((layers, layers, 2))
    s[np.arange(layers), np.arange(layers)] = np.arange(1, layers + 1)[:, None] * [1.0, 0.1]
    error = np.concatenate([np.square(s).mean(axis=0), np.zeros((layers, 1))], axis=1)
    nbytes = np.tile([1, 2, 4], (layers, 1))
    found = repair(QuadraticForm.fixed(s, error, shrinkage), nbytes, 9, solve(error, nbytes, 9))
    assert found.formats.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.error == pytest.approx(total(error, found.formats))
    assert found.gap == pytest.approx(shrinkage, abs=1e-12)


def test_many_layers_are_repaired_across_blocks_deterministically() -> None:
    s, error, nbytes = unet_like(layers=250, sketches=16, seed=0, common=0.3)
    budget = int(nbytes[:, 2].sum() * 0.4)
    form, start = QuadraticForm.fixed(s, error, 0.5), solve(error, nbytes, budget)
    found, again = (repair(form, nbytes, budget, start) for _ in range(2))
    assert found.formats.tolist() == again.formats.tolist()
    assert found.error < 0.9 * form.value(start.formats[None])[0]
    assert found.nbytes <= budget
    draw = np.random.default_rng(0)
    near = np.repeat(found.formats[None], 4000, axis=0)
    for policy in near:
        policy[draw.integers(0, 250, size=2)] = draw.integers(0, 3, size=2)
    fit = near[[size(nbytes, policy) <= budget for policy in near]]
    assert form.value(fit).min() >= found.error * (1 - 1e-9)


def test_repair_with_powers_alone_keeps_an_exact_solution() -> None:
    s, error, nbytes = unet_like(layers=30, sketches=8, seed=0, common=0.5)
    budget = int(nbytes[:, 2].sum() * 0.4)
    start = solve(error, nbytes, budget, gap=0.0)
    found = repair(QuadraticForm.fixed(s, error, 0.0), nbytes, budget, start)
    assert found.formats.tolist() == start.formats.tolist()
    assert found.error == pytest.approx(start.error)


def test_a_single_layer_gets_the_best_format_that_fits() -> None:
    s = np.array([[[2.0, 1.0, 0.0]]])
    form, nbytes = QuadraticForm.fixed(s, np.square(s).mean(axis=0), 0.5), np.array([[1, 2, 4]])
    assert repair(form, nbytes, 3, Solution(np.array([0]), 4.0, 1, 0.0)).formats.tolist() == [1]


def test_layers_that_cancel_are_changed_together() -> None:
    """Either change alone makes it worse: T goes from 2 to 4 or to -2.5; both together give -0.5."""
    s = np.array([[[1.0, 3.0], [1.0, -3.5]]])
    form, nbytes = QuadraticForm.fixed(s, np.square(s).mean(axis=0), 1.0), np.ones((2, 2), dtype=np.int64)
    start = solve(form.error, nbytes, 2)
    assert start.formats.tolist() == [0, 0]
    found = repair(form, nbytes, 2, start)
    assert (found.formats.tolist(), found.error) == ([1, 1], 0.25)


def test_a_start_that_does_not_fit_or_is_not_allowed_is_refused() -> None:
    form = QuadraticForm.fixed(np.ones((1, 1, 2)), np.array([[np.inf, 1.0]]), 0.5)
    nbytes = np.array([[1, 2]])
    with pytest.raises(BudgetError, match=r"takes 2 bytes.* 1;"):
        repair(form, nbytes, 1, Solution(np.array([1]), 1.0, 2, 0.0))
    with pytest.raises(BitPolicyError, match="not allowed"):
        repair(form, nbytes, 2, Solution(np.array([0]), 1.0, 1, 0.0))
