"""The smallest policy whose images are as close to the reference as asked.

Predicted error e and measured quality are tied by real generations: for small errors the image's error is proportional
to that of the latent, so quality ~ a - 10 log10 e, in decibels, with an `a` that each measurement corrects. The next
policy to measure is the one at the error where that line meets the target, kept inside the interval between the largest
error known to be good enough and the smallest known not to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from bitpolicy.search.knapsack import Solution

_CLOSE = 0.005  # relative difference of bytes at which it is not worth measuring another policy
MEASUREMENTS = 8  # for one target
_EDGE = 0.1  # share of the interval that a guess keeps away from its ends


@dataclass(frozen=True)
class Measured:
    """One policy.

    Attributes:
        solution: the smallest of its predicted error.
        place: log10 of the predicted error it was asked for.
        quality: in decibels.
    """

    solution: Solution
    place: float
    quality: float


@dataclass
class Reach:
    """Looks for the smallest policy of a quality, and remembers what it measured for the next target.

    Attributes:
        solve: the smallest policy of a predicted error.
        measure: a policy's quality; larger is better, ten more for a tenth of the error's power.
        most, least: predicted errors between which to look, the larger one of the smallest policy; least > 0.
        measured: everything so far.
    """

    solve: Callable[[float], Solution]
    measure: Callable[[Solution], float]
    most: float
    least: float
    measured: list[Measured] = field(default_factory=list)

    def smallest(self, target: float) -> Measured | None:
        """The smallest policy found that reaches `target`; None where even the most accurate one does not."""
        if not self.measured:
            self._try(self.most)
        for _ in range(MEASUREMENTS):
            good, bad = self._bracket(target)
            if bad is None or (good and good.solution.nbytes - bad.solution.nbytes <= _CLOSE * good.solution.nbytes):
                break
            guess = bad.place + (bad.quality - target) / 10
            low = math.log10(self.least)
            if good is None:
                if bad.place <= low:
                    return None
                self._try(10 ** max(min(guess, bad.place - 0.05), low))
                continue
            room = bad.place - good.place
            other = good.place + (good.quality - target) / 10
            between = (guess * (good.quality - target) + other * (target - bad.quality)) / (good.quality - bad.quality)
            self._try(10 ** min(max(between, good.place + _EDGE * room), bad.place - _EDGE * room))
        return self._bracket(target)[0]

    def _bracket(self, target: float) -> tuple[Measured | None, Measured | None]:
        """The largest error that is good enough, and the smallest above it that is not."""
        good = max((m for m in self.measured if m.quality >= target), key=lambda m: m.place, default=None)
        worse = [m for m in self.measured if m.quality < target and (good is None or m.place > good.place)]
        return good, min(worse, key=lambda m: m.place, default=None)

    def _try(self, error: float) -> None:
        solution = self.solve(error)
        self.measured.append(Measured(solution, math.log10(error), self.measure(solution)))
