"""How layers' errors add up or cancel: the quadratic form of the sketches, shrunk towards its diagonal.

A sketch is s_r(l, f) = v_r . dx_0(l, f), so for a policy z (bitpolicy.sensitivity.probes.adjoint)

    Q(z) = mean_r T_r(z)^2,  T_r(z) = sum_l s_r(l, z_l);        A(z) = sum_l e(l, z_l);
    E(z) = (1 - lambda) A(z) + lambda Q(z).

A is the diagonal of Q, so lambda shrinks what is between layers, as Ledoit and Wolf (2004) shrink a covariance: a few
dozen sketches know little of some hundred thousand pairs. How much they know is asked of samples that were held out.
With y the mean of T^2 over the sketches of one sample, and a, q those of A and Q from the other samples, the loss is
the relative squared error over policies z and samples

    loss(lambda) = mean ((y - a - lambda (q - a)) / a)^2 = const - 2 lambda b + lambda^2 c,
    b = mean (y - a)(q - a) / a^2,   c = mean (q - a)^2 / a^2.

It is squared, not logarithmic, because y is an unbiased but very noisy measurement: noise that is independent of a and
q moves no squared loss, while log y is biased; and relative to a, which lambda does not change, so that policies of
all sizes count. b estimates the power of what is truly between layers, c that with the noise of the sketches on top,
and b / c is the least loss. A noisy b of either sign has to be told from a positive one, so its standard error over
samples is taken off first: lambda = (b - se(b)) / c, and zero if that is negative. Then the loss is below lambda = 0's.
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
_COLUMNS = 256  # whose exchanges with all others are weighed at once
_STRICT = 1e-12  # share of the error by which an exchange has to better it: more than rounding


@dataclass(frozen=True)
class QuadraticForm:
    """E(z).

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
        """The form with the shrinkage that held-out samples ask for.

        Args:
            sketches: float, shape (R, layers, formats), or without the last format if that is FP16.
            error: float64, shape (layers, formats), >= 0; infinite where a layer may not have the format.
            groups: of each sketch, which sample it is of; length R. One sample leaves nothing to hold out.
            policies: int64, shape (N, layers): those on which predictions are judged, e.g. `feasible`.
        """
        plain = cls.fixed(sketches, error, 0.0)
        return cls(plain.error, plain.sketches, _shrinkage(plain.sketches, np.asarray(groups), policies))

    @classmethod
    def fixed(cls, sketches: np.ndarray, error: np.ndarray, shrinkage: float) -> QuadraticForm:
        """The form with a shrinkage that was chosen otherwise; the arguments are those of `of`."""
        missing = error.shape[1] - sketches.shape[2]
        full = np.pad(np.asarray(sketches, dtype=np.float64), [(0, 0), (0, 0), (0, missing)])
        allowed = np.isfinite(error)
        return cls(error, np.ascontiguousarray(np.where(allowed, full, 0.0).transpose(1, 2, 0)), shrinkage)

    def value(self, policies: np.ndarray) -> np.ndarray:
        """E of each policy, float64, shape (N); infinite for one that may not be. `policies` has shape (N, layers)."""
        sums = _sums(self._columns, policies)
        alone, barred, vectors = sums[:, 0], sums[:, 1], sums[:, 2:]
        found = (1 - self.shrinkage) * alone + self.shrinkage * np.square(vectors).mean(axis=1)
        return np.where(barred > 0, np.inf, found)

    @cached_property
    def _columns(self) -> np.ndarray:
        """What is summed over layers: errors, how many may not be, and sketches; shape (layers, formats, 2 + R)."""
        allowed = np.isfinite(self.error)
        own = np.stack([np.where(allowed, self.error, 0.0), ~allowed], axis=2)
        return np.concatenate([own, self.sketches], axis=2)


def feasible(error: np.ndarray, nbytes: np.ndarray, budget: int, count: int = 256, seed: int = 0) -> np.ndarray:
    """Policies within the budget, from near the exact solution to far off, int64, shape (count, layers).

    Each is the hull's choice for errors that were multiplied by random factors, a layer's own for each format; the
    spread of the factors grows from policy to policy.
    """
    draw = np.random.default_rng(seed)
    found = []
    for octaves in np.linspace(0, 6, count):
        hull = Hull.of(error * 2.0 ** (octaves * draw.standard_normal(error.shape)), nbytes)
        found.append(hull.choice(hull.steps(budget)))
    return np.stack(found)


def repair(form: QuadraticForm, nbytes: np.ndarray, budget: int, start: Solution) -> Solution:
    """Change one layer or two at a time, within the budget, until no such change lowers E.

    Args:
        form: E.
        nbytes: int64, shape (layers, formats).
        budget: bytes for all layers together.
        start: a choice within it, e.g. the exact solution for the errors alone.

    Returns:
        A solution that is no worse than `start`. Its `error` is E, and its `gap` is to (1 - lambda) times the
        Lagrangian bound on A, which is below E for any choice that fits.

    Raises:
        BudgetError: `start` does not fit.
        BitPolicyError: a layer of `start` has a format that it may not have.
    """
    if not np.isfinite(total(form.error, start.formats)):
        raise BitPolicyError(
            "a layer of the policy to repair has a format that it may not have; solve for these errors"
        )
    if total(nbytes, start.formats) > budget:
        raise BudgetError(
            f"the policy to repair takes {total(nbytes, start.formats):,} bytes of {budget:,}; solve for this budget"
        )
    choice = _local_optimum(form, nbytes, budget, np.asarray(start.formats, dtype=np.int64))
    error = float(form.value(choice[None])[0])
    bound = (1 - form.shrinkage) * Hull.of(form.error, nbytes).relaxed(budget)[1]
    return Solution(choice, error, int(total(nbytes, choice)), relative_gap(error, bound))


def _local_optimum(form: QuadraticForm, nbytes: np.ndarray, budget: int, choice: np.ndarray) -> np.ndarray:
    """Goes over blocks of columns, taking each block's best exchange until there is none, and over again."""
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
    """All columns (layer, format) that are allowed. One that a layer has already changes nothing, so pairs with it are
    the single changes."""

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
        """`choice` after the best exchange of one of `rows` with any column; the same where none gains `least`."""
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
        """What each column alone would change in E, shape (columns), and in every T_r, shape (columns, R)."""
        at = np.arange(len(choice)), choice
        sketches, error, shrinkage = self.form.sketches, self.form.error, self.form.shrinkage
        delta = sketches[self.layer, self.format] - sketches[at][self.layer]
        crossed = (delta @ (2 * sketches[at].sum(axis=0)) + np.square(delta).sum(axis=1)) / delta.shape[1]
        alone = error[self.layer, self.format] - error[at][self.layer]
        return (1 - shrinkage) * alone + shrinkage * crossed, delta


def _shrinkage(sketches: np.ndarray, groups: np.ndarray, policies: np.ndarray) -> float:
    """lambda from leaving out one sample at a time; zero where nothing can be said."""
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
    """b and c of one held-out sample: T^2 and the sum of squares are of shape (policies, R)."""
    y, q = crossed[:, held_out].mean(axis=1), crossed[:, ~held_out].mean(axis=1)
    a = alone[:, ~held_out].mean(axis=1)
    return float(((y - a) * (q - a) / a**2).mean()), float(((q - a) ** 2 / a**2).mean())


def _sums(values: np.ndarray, policies: np.ndarray) -> np.ndarray:
    """sum_l values[l, z_l] of each policy, float64, shape (N, R), by a product with 0/1 rows: faster than gathering.
    A format whose values are all zero, FP16 as a rule, takes no part."""
    used = np.flatnonzero(values.any(axis=(0, 2)))
    columns = values[:, used].reshape(len(values) * len(used), values.shape[2])
    found = np.empty((len(policies), values.shape[2]))
    for i in range(0, len(policies), _POLICIES):
        taken = policies[i : i + _POLICIES, :, None] == used
        found[i : i + _POLICIES] = taken.reshape(len(taken), -1).astype(np.float64) @ columns
    return found
