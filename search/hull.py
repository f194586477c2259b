"""The Lagrangian relaxation of a multiple-choice knapsack, for every limit at once.

At a price p per byte, every layer takes the format that minimizes e + p b. As p falls, layers step along the lower
convex hulls of their own (b, e), steeper steps first (Sinha and Zoltners 1979). Each point on the way is the exact
solution for its own bytes, and for any number of bytes B

    L(p) = sum_l min_f (e(l, f) + p b(l, f)) - p B  <=  the least error within B.

A solution that contains (l, f) has an error of at least L(p) + r(l, f), with the reduced cost
r(l, f) = e(l, f) + p b(l, f) - min_f (e + p b). The code says cost and weight, because bytes can also be the cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitpolicy.kernels.errors import BitPolicyError

_NEAR = 256  # number of columns with least reduced cost whose pairs are tried
_EXCHANGES = 8  # maximum number of exchanged pairs


@dataclass(frozen=True)
class Hull:
    """The Lagrangian relaxation for all limits at once: a sequence of steps, each of which changes one layer.

    Attributes:
        cost: float64, shape (layers, formats); infinite where a layer may not have the format.
        weight: int64 or float64, shape (layers, formats).
        path: int64, shape (steps of one layer + 1, layers): the formats on each layer's own hull, lightest first.
        layer, step: int64, shape (steps): the layer that changes, and its position in that layer's path.
        rate: float64, shape (steps), descending: cost saved per unit of weight.
    """

    cost: np.ndarray
    weight: np.ndarray
    path: np.ndarray
    layer: np.ndarray
    step: np.ndarray
    rate: np.ndarray

    @classmethod
    def of(cls, cost: np.ndarray, weight: np.ndarray) -> Hull:
        """Raises:
        BitPolicyError: a layer has no allowed format, or a cost is negative or NaN.
        """
        if not (cost >= 0).all():
            raise BitPolicyError(
                f"an error of {cost[~(cost >= 0)][0]} is not a valid error power, which is at least 0; "
                "run `bitpolicy probe` again"
            )
        allowed = np.isfinite(cost)
        if not allowed.any(axis=1).all():
            raise BitPolicyError(
                f"layer {int(allowed.any(axis=1).argmin())} has no allowed format: every error is infinite; "
                "add one that fits it to --formats"
            )
        weight = np.where(allowed, weight, 0)
        path, rates = _paths(cost, weight, allowed)
        order = np.argsort(-rates, axis=None, kind="stable")[: int((rates > 0).sum())]
        step, layer = np.divmod(order, max(len(cost), 1))
        return cls(cost, weight, path, layer, step, rates.flat[order])

    def choice(self, steps: int) -> np.ndarray:
        """The formats after the first `steps` steps: the exact solution for the weight they have."""
        layers = len(self.cost)
        return self.path[np.bincount(self.layer[:steps], minlength=layers), np.arange(layers)]

    def steps(self, limit: float) -> int:
        """The number of steps that stay within `limit`."""
        count = int(np.searchsorted(self.weights, limit, side="right")) - 1
        while count > 0 and total(self.weight, self.choice(count)) > limit:  # summation order changes float totals
            count -= 1
        return max(count, 0)

    def relaxed(self, limit: float) -> tuple[np.ndarray, float, np.ndarray]:
        """The last choice within `limit`, a lower bound on the cost of any, and the reduced costs r(l, f)."""
        count = self.steps(limit)
        choice, price = self.choice(count), float(self.rate[count]) if count < len(self.rate) else 0.0
        rows = np.arange(len(choice))
        dearer, more = (values - values[rows, choice][:, None] for values in (self.cost, self.weight))
        reduced = dearer + price * more
        rounding = float(np.minimum(reduced.min(axis=1), 0).sum())
        low = float(total(self.cost, choice)) - price * float(limit - total(self.weight, choice)) + rounding
        return choice, max(low, 0.0), reduced

    @cached_property
    def weights(self) -> np.ndarray:
        """Total weight after each number of steps, shape (steps + 1)."""
        return self._along(self.weight)

    @cached_property
    def costs(self) -> np.ndarray:
        """Total cost after each number of steps, shape (steps + 1)."""
        return self._along(self.cost)

    def _along(self, values: np.ndarray) -> np.ndarray:
        at = np.take_along_axis(values.T, self.path, axis=0)
        return np.cumsum(np.append(at[0].sum(), np.diff(at, axis=0)[self.step, self.layer]))


def exchanged(hull: Hull, limit: float, choice: np.ndarray, reduced: np.ndarray) -> np.ndarray:
    """The relaxed choice after the best exchanges within `limit` of up to two layers, among the nearest columns."""
    rows = np.arange(len(choice))
    others = reduced.copy()
    others[rows, choice] = np.inf
    near = np.argsort(others, axis=None, kind="stable")[:_NEAR]
    layer, format = np.divmod(near[np.isfinite(others.flat[near])], reduced.shape[1])
    back = np.unique(layer)
    layer, format = np.concatenate([layer, back, [0]]), np.concatenate([format, choice[back], choice[:1]])
    for _ in range(_EXCHANGES):
        more = hull.weight[layer, format] - hull.weight[layer, choice[layer]]
        dearer = hull.cost[layer, format] - hull.cost[layer, choice[layer]]
        fits = more[:, None] + more <= limit - total(hull.weight, choice)
        one = (layer[:, None] != layer) | (format[:, None] == choice[layer][:, None])
        first, second = np.divmod(np.where(fits & one, dearer[:, None] + dearer, np.inf).argmin(), len(layer))
        changed = choice.copy()
        for column in (first, second):  # the first may be the format that the layer already has
            changed[layer[column]] = format[column]
        if not total(hull.cost, changed) < total(hull.cost, choice) or total(hull.weight, changed) > limit:
            break
        choice = changed
    return choice


def total(values: np.ndarray, choice: np.ndarray) -> float:
    return values[np.arange(len(choice)), choice].sum()


def _paths(cost: np.ndarray, weight: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each layer's lower convex hull, shape (steps + 1, layers), and its descending rates, zero past its end."""
    rows = np.arange(len(cost))
    lightest = np.where(allowed, weight, np.inf).min(axis=1, keepdims=True)
    at = np.where(allowed & (weight == lightest), cost, np.inf).argmin(axis=1)
    path, rates = [at], [np.full(len(cost), np.inf)]
    while True:
        saved, more = cost[rows, at][:, None] - cost, weight - weight[rows, at][:, None]
        ahead = (saved > 0) & (more > 0)
        rate = np.divide(saved, more, out=np.zeros_like(cost), where=ahead)
        steepest = rate.max(axis=1)
        if not (steepest > 0).any():
            return np.stack(path), np.stack(rates)[1:]
        farthest = np.where(rate >= steepest[:, None], more, -1).argmax(axis=1)
        at = np.where(steepest > 0, farthest, at)
        path.append(at)
        rates.append(np.minimum(steepest, rates[-1]))
