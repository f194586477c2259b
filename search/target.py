"""Searches for the smallest policy that reaches a given image quality.

Generated images link the predicted error e to the measured quality. For small errors the image's error is proportional
to the latent's, so quality ~ a - 10 log10 e in decibels, and each measurement corrects `a`. The next policy to measure
is at the error where this line meets the target, kept between the largest error known to be good enough and the
smallest known not to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from bitpolicy.search.knapsack import Solution

_CLOSE = 0.005  # relative difference in bytes below which another measurement is not worth it
MEASUREMENTS = 8  # at most, per target
_EDGE = 0.1  # share of the interval that a guess keeps away from its ends


@dataclass(frozen=True)
class Measured:
    """One measured policy.

    Attributes:
        solution: the smallest policy with its predicted error.
        place: log10 of the requested predicted error.
        quality: in decibels.
    """

    solution: Solution
    place: float
    quality: float


@dataclass
class Reach:
    """Searches for the smallest policy of a given quality. It keeps its measurements for the next target.

    Attributes:
        solve: predicted error -> the smallest policy with at most that error.
        measure: a policy's quality; larger is better, and a tenth of the error power adds 10.
        most, least: the range of predicted errors to search; `most` is that of the smallest policy; least > 0.
        measured: all measurements so far.
    """

    solve: Callable[[float], Solution]
    measure: Callable[[Solution], float]
    most: float
    least: float
    measured: list[Measured] = field(default_factory=list)

    def smallest(self, target: float) -> Measured | None:
        """The smallest policy found that reaches `target`; None if even the most accurate one does not."""
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
        """The largest error that is good enough, and the smallest error above it that is not."""
        good = max((m for m in self.measured if m.quality >= target), key=lambda m: m.place, default=None)
        worse = [m for m in self.measured if m.quality < target and (good is None or m.place > good.place)]
        return good, min(worse, key=lambda m: m.place, default=None)

    def _try(self, error: float) -> None:
        solution = self.solve(error)
        self.measured.append(Measured(solution, math.log10(error), self.measure(solution)))
