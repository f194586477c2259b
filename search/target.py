"""The smallest policy whose images are as close to the reference as asked.

Predicted error e and measured quality are tied by real generations: for small errors the image's error is proportional
to that of the latent, so PSNR ~ a - 10 log10 e with an `a` that is learned on the way. Each policy that is measured
halves what is left between the largest error known to be good enough and the smallest known not to be, at the error
where that line says the target lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from bitpolicy.search.knapsack import Solution

_CLOSE = 0.005  # relative difference of bytes at which it is not worth measuring another policy
_MEASUREMENTS = 10
_FLAT = 0.05  # a step that goes less far than this share of the interval is lengthened to it


@dataclass(frozen=True)
class Reached:
    """The smallest policy found that reaches a target.

    Attributes:
        solution: None where even the best policy does not.
        quality: measured of it, or of the best policy.
        measured: how many policies were.
    """

    solution: Solution | None
    quality: float
    measured: int


def reach(
    target: float, solve: Callable[[float], Solution], measure: Callable[[Solution], float], most: float, least: float
) -> Reached:
    """Find it.

    Args:
        target: in decibels, or any quality that grows as the error's power falls, as -10 log10 does.
        solve: the smallest policy of a predicted error.
        measure: the quality of a policy.
        most, least: predicted errors between which to look, the larger one of the smallest policy; least > 0.
    """
    good, bad = math.log10(least), math.log10(most)
    best = solve(least)
    quality = measure(best)
    if quality < target:
        return Reached(None, quality, 1)
    reached, measured, smallest = Reached(best, quality, 1), 1, solve(most).nbytes
    guess = good + (quality - target) / 10
    while measured < _MEASUREMENTS and reached.solution is not None:
        if reached.solution.nbytes - smallest <= _CLOSE * reached.solution.nbytes:
            break
        room = bad - good
        tried = solve(10 ** min(max(guess, good + _FLAT * room), bad if measured == 1 else bad - _FLAT * room))
        quality = measure(tried)
        measured += 1
        where = math.log10(max(tried.error, least))
        if quality >= target:
            good, reached = where, Reached(tried, quality, measured)
        else:
            bad, smallest = where, tried.nbytes
        guess = where + (quality - target) / 10
    return Reached(reached.solution, reached.quality, measured)
