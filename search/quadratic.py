"""How layers' errors add up or cancel: the quadratic form of the sketches, shrunk towards its diagonal.

A sketch is s_r(l, f) = v_r . dx_0(l, f), so for a policy z (bitpolicy.sensitivity.probes.adjoint)

    Q(z) = mean_r T_r(z)^2,  T_r(z) = sum_l s_r(l, z_l);        A(z) = sum_l e(l, z_l);
    E(z) = (1 - lambda) A(z) + lambda Q(z).

A is the diagonal of Q, so lambda shrinks the terms between layers, as Ledoit and Wolf (2004) shrink a covariance: a few
dozen sketches say little about some hundred thousand pairs. Held-out samples tell how much they say. Let y be the mean
of T^2 over the sketches of one sample, and a, q the values of A and Q from the other samples. The loss is the relative
squared error over policies z and samples

    loss(lambda) = mean ((y - a - lambda (q - a)) / a)^2 = const - 2 lambda b + lambda^2 c,
    b = mean (y - a)(q - a) / a^2,   c = mean (q - a)^2 / a^2.

The loss is squared, not logarithmic, because y is an unbiased but very noisy measurement: noise that is independent of
a and q does not shift a squared loss, while log y is biased. It is relative to a, which lambda does not change, so that
policies of all sizes count. b estimates the power of the true terms between layers, c that power plus the noise of the
sketches, and b / c gives the least loss. To avoid mistaking noise for a positive b, its standard error over samples is
subtracted first: lambda = (b - se(b)) / c, or zero if that is negative. The loss is then below that of lambda = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.budget import BudgetError
from bitpolicy.search.hull import Hull, total
from bitpolicy.search.knapsack import Solution, relative_gap

_POLICIES = 512  # evaluated at once
_COLUMNS = 256  # columns whose exchanges with all others are evaluated at once
_STRICT = 1e-12  # share of the error that an exchange must gain, to exceed rounding


@dataclass(frozen=True)
class QuadraticForm:
    """E(z), the predicted error of a policy.

    Attributes:
        error: e, float64, shape (layers, formats); infinite where a layer may not have the format.
        sketches: s, float64, shape (layers, formats, R); zero where the error is infinite.
        shrinkage: lambda, in [0, 1]: 0 adds powers, 1 adds vectors.
    """

    error: np.ndarray
    sketches: np.ndarray
    shrinkage: float

    @classmethod
    def of(cls, sketches: np.ndarray, error: np.ndarray, groups: Sequence[int], policies: np.ndarray) -> QuadraticForm:
        """The form with the shrinkage that held-out samples support.

        Args:
            sketches: float, shape (R, layers, formats), or without the last format if that is FP16.
            error: float64, shape (layers, formats), >= 0; infinite where a layer may not have the format.
            groups: the sample of each sketch, length R. With a single sample nothing can be held out.
            policies: int64, shape (N, layers): policies to judge predictions on, e.g. from `feasible`.
        """
        plain = cls.fixed(sketches, error, 0.0)
        return cls(plain.error, plain.sketches, _shrinkage(plain.sketches, np.asarray(groups), policies))

    @classmethod
    def fixed(cls, sketches: np.ndarray, error: np.ndarray, shrinkage: float) -> QuadraticForm:
        """The form with a given shrinkage; the other arguments are those of `of`."""
        missing = error.shape[1] - sketches.shape[2]
        full = np.pad(np.asarray(sketches, dtype=np.float64), [(0, 0), (0, 0), (0, missing)])
        allowed = np.isfinite(error)
        return cls(error, np.ascontiguousarray(np.where(allowed, full, 0.0).transpose(1, 2, 0)), shrinkage)

    def value(self, policies: np.ndarray) -> np.ndarray:
        """E of each policy, float64, shape (N); infinite if the policy is not allowed. `policies` is (N, layers)."""
        sums = _sums(self._columns, policies)
        alone, barred, vectors = sums[:, 0], sums[:, 1], sums[:, 2:]
        found = (1 - self.shrinkage) * alone + self.shrinkage * np.square(vectors).mean(axis=1)
        return np.where(barred > 0, np.inf, found)

    @cached_property
    def _columns(self) -> np.ndarray:
        """The summands per layer: errors, whether disallowed, and sketches; shape (layers, formats, 2 + R)."""
        allowed = np.isfinite(self.error)
        own = np.stack([np.where(allowed, self.error, 0.0), ~allowed], axis=2)
        return np.concatenate([own, self.sketches], axis=2)


def feasible(error: np.ndarray, nbytes: np.ndarray, budget: int, count: int = 256, seed: int = 0) -> np.ndarray:
    """Policies within the budget, from near the exact solution to far away, int64, shape (count, layers).

    Each is the hull's choice for errors multiplied by random factors, one per layer and format. The spread of the
    factors grows from policy to policy.
    """
    draw = np.random.default_rng(seed)
    found = []
    for octaves in np.linspace(0, 6, count):
        hull = Hull.of(error * 2.0 ** (octaves * draw.standard_normal(error.shape)), nbytes)
        found.append(hull.choice(hull.steps(budget)))
    return np.stack(found)


def repair(form: QuadraticForm, nbytes: np.ndarray, budget: int, start: Solution) -> Solution:
    """Improve a choice by changing one or two layers at a time, within the budget, until no change lowers E.

    Args:
        form: E.
        nbytes: int64, shape (layers, formats).
        budget: bytes for all layers together.
        start: a choice within the budget, e.g. the exact solution for the errors alone.

    Returns:
        A solution that is no worse than `start`. Its `error` is E. Its `gap` is relative to (1 - lambda) times the
        Lagrangian bound on A, which is below E for any choice that fits.

    Raises:
        BudgetError: `start` does not fit.
        BitPolicyError: a layer of `start` has a format that it may not have.
    """
    if not np.isfinite(total(form.error, start.formats)):
        raise BitPolicyError(
            "a layer of the policy to repair has a format that is not allowed for it; solve again for these errors"
        )
    if total(nbytes, start.formats) > budget:
        raise BudgetError(
            f"the policy to repair takes {total(nbytes, start.formats):,} bytes, but the budget is {budget:,}; "
            "solve again for this budget"
        )
    choice = _local_optimum(form, nbytes, budget, np.asarray(start.formats, dtype=np.int64))
    error = float(form.value(choice[None])[0])
    bound = (1 - form.shrinkage) * Hull.of(form.error, nbytes).relaxed(budget)[1]
    return Solution(choice, error, int(total(nbytes, choice)), relative_gap(error, bound))


def _local_optimum(form: QuadraticForm, nbytes: np.ndarray, budget: int, choice: np.ndarray) -> np.ndarray:
    """Cycle over blocks of columns, making each block's best exchange, until no block has one."""
    moves = _Moves.of(form, nbytes, budget)
    value, unchanged, block = float(form.value(choice[None])[0]), 0, 0
    blocks = -(-len(moves.layer) // _COLUMNS)
    while unchanged < blocks:
        changed = moves.best(choice, slice(block * _COLUMNS, (block + 1) * _COLUMNS), _STRICT * value)
        new = float(form.value(changed[None])[0])
        if new < value:
            choice, value, unchanged = changed, new, 0
        else:
            unchanged, block = unchanged + 1, (block + 1) % blocks
    return choice


@dataclass(frozen=True)
class _Moves:
    """All allowed columns (layer, format). A layer's current column changes nothing, so a pair with it is a change of
    one layer."""

    form: QuadraticForm
    nbytes: np.ndarray
    budget: int
    layer: np.ndarray
    format: np.ndarray

    @classmethod
    def of(cls, form: QuadraticForm, nbytes: np.ndarray, budget: int) -> _Moves:
        layer, format = np.isfinite(form.error).nonzero()
        return cls(form, nbytes, budget, layer, format)

    def best(self, choice: np.ndarray, rows: slice, least: float) -> np.ndarray:
        """`choice` after the best exchange of one of `rows` with any column; unchanged if none gains `least`."""
        gain, delta = self._alone(choice)
        more = self.nbytes[self.layer, self.format] - self.nbytes[self.layer, choice[self.layer]]
        slack = self.budget - total(self.nbytes, choice)
        weight = 2 * self.form.shrinkage / delta.shape[1]
        both = gain[rows, None] + gain + (weight * delta[rows] @ delta.T if weight else 0.0)
        kept = self.format == choice[self.layer]
        apart = (self.layer[rows, None] != self.layer) | kept
        both[~apart | (more[rows, None] + more > slack)] = 0.0
        first, second = np.divmod(both.argmin(), len(gain))
        changed = choice.copy()
        if both[first, second] < -least:
            changed[self.layer[second]] = self.format[second]
            changed[self.layer[rows][first]] = self.format[rows][first]
        return changed

    def _alone(self, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The change that each column alone makes to E, shape (columns), and to every T_r, shape (columns, R)."""
        at = np.arange(len(choice)), choice
        sketches, error, shrinkage = self.form.sketches, self.form.error, self.form.shrinkage
        delta = sketches[self.layer, self.format] - sketches[at][self.layer]
        crossed = (delta @ (2 * sketches[at].sum(axis=0)) + np.square(delta).sum(axis=1)) / delta.shape[1]
        alone = error[self.layer, self.format] - error[at][self.layer]
        return (1 - shrinkage) * alone + shrinkage * crossed, delta


def _shrinkage(sketches: np.ndarray, groups: np.ndarray, policies: np.ndarray) -> float:
    """lambda from leaving out one sample at a time; zero if the samples cannot tell."""
    crossed, alone = np.square(_sums(sketches, policies)), _sums(np.square(sketches), policies)
    usable = alone.min(axis=1) > 0
    samples = np.unique(groups)
    if len(samples) < 2 or not usable.any():
        return 0.0
    crossed, alone = crossed[usable], alone[usable]
    b, c = np.array([_fold(crossed, alone, groups == sample) for sample in samples]).T
    certain = b.mean() - b.std(ddof=1) / len(samples) ** 0.5
    return float(np.clip(certain / c.mean(), 0, 1)) if c.mean() > 0 else 0.0


def _fold(crossed: np.ndarray, alone: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """b and c of one held-out sample. T^2 and the sum of squares have shape (policies, R)."""
    y, q = crossed[:, held_out].mean(axis=1), crossed[:, ~held_out].mean(axis=1)
    a = alone[:, ~held_out].mean(axis=1)
    return float(((y - a) * (q - a) / a**2).mean()), float(((q - a) ** 2 / a**2).mean())


def _sums(values: np.ndarray, policies: np.ndarray) -> np.ndarray:
    """sum_l values[l, z_l] of each policy, float64, shape (N, R), as a product with 0/1 rows, faster than gathering.
    Formats whose values are all zero (usually FP16) are skipped."""
    used = np.flatnonzero(values.any(axis=(0, 2)))
    columns = values[:, used].reshape(len(values) * len(used), values.shape[2])
    found = np.empty((len(policies), values.shape[2]))
    for i in range(0, len(policies), _POLICIES):
        taken = policies[i : i + _POLICIES, :, None] == used
        found[i : i + _POLICIES] = taken.reshape(len(taken), -1).astype(np.float64) @ columns
    return found
