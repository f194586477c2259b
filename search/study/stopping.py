"""Decides whether the trials that are left are worth their time.

Let c_i be the incumbent's error divided by that of trial i on the same samples: 1 is a tie, more is a gain. With m and
s the mean and the standard deviation of the k trials that a sampler suggested, the next one is predicted to be

    c = m + s sqrt(1 + 1 / k) T,    T from Student's t with k - 1 degrees of freedom

(Gelman et al. 2013, section 3.2: a normal sample of unknown mean and variance). What a trial gains on average is the
expected improvement E[max(c - 1, 0)], and n trials together gain at most n times that, whether or not they depend on
each other. The study stops once this bound is below a tenth of a decibel. A terrible trial says little about how good a
trial can be, and it spreads c less than it would spread errors or decibels, because c is at least 0.

The verdict depends on nothing but the finished trials, in the order of their turns. So a study that was killed, or that
has several workers, comes to the same verdict wherever it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from optuna.trial import FrozenTrial
from scipy import stats

from bitpolicy.search.study.storage import TURN

WORTH = 0.1  # dB
_FEWEST = 5  # suggested trials before anything is predicted
_DB = 10 / math.log(10)  # a relative gain of x is x times as many dB, for small x


@dataclass(frozen=True)
class Verdict:
    """Why a study stopped.

    Attributes:
        trials: finished trials that say so.
        left: trials that were still to come.
        gain_db: most that these would gain together, on average.
        best: number of the incumbent's trial.
        nearest_db: how far the best other suggestion was from the incumbent, on the samples that it was scored on;
            negative if it was worse. None if the incumbent has no error.
    """

    trials: int
    left: int
    gain_db: float
    best: int
    nearest_db: float | None


def expected_gain(ratios: Sequence[float], left: int) -> float:
    """A bound on what `left` more trials would gain together, on average, in dB.

    Args:
        ratios: c_i of the trials so far, at least three: with fewer, T has no mean.
    """
    count, mean = len(ratios), float(np.mean(ratios))
    scale = float(np.std(ratios, ddof=1)) * math.sqrt(1 + 1 / count)
    if scale == 0:
        return _DB * left * max(mean - 1, 0.0)
    degrees, z = count - 1, (1 - mean) / scale
    density, tail = stats.t.pdf(z, degrees), stats.t.sf(z, degrees)
    return _DB * left * scale * float(density * (degrees + z * z) / (degrees - 1) - z * tail)


def in_turn(finished: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The finished trials of the first turns, up to the first turn that is not finished."""
    by_turn = {trial.user_attrs.get(TURN): trial for trial in reversed(finished)}
    ordered: list[FrozenTrial] = []
    while (trial := by_turn.get(len(ordered))) is not None:
        ordered.append(trial)
    return ordered


def verdict(trials: Sequence[FrozenTrial], starts: int, samples: int, asked: int) -> Verdict | None:
    """Whether a study of `asked` trials stops after these; None if it goes on.

    Args:
        trials: in the order of their turns.
        starts: how many of them were given, not suggested: the first ones.
        samples: the number of search samples. Only a trial that was scored on all of them can be the incumbent.
        asked: the most trials.
    """
    suggested, left = trials[starts:], asked - len(trials)
    whole = [trial for trial in trials if len(trial.intermediate_values) == samples]
    if len(suggested) < _FEWEST or left <= 0 or not whole:
        return None
    incumbent = min(whole, key=lambda trial: (trial.value, trial.number))
    ratios = [_ratio(incumbent, trial) for trial in suggested]
    gain = expected_gain(ratios, left)
    if gain >= WORTH:
        return None
    nearest = max(_ratio(incumbent, trial) for trial in suggested if trial is not incumbent)
    nearest_db = 10 * math.log10(nearest) if nearest > 0 else None
    return Verdict(len(trials), left, gain, incumbent.number, nearest_db)


def _ratio(incumbent: FrozenTrial, trial: FrozenTrial) -> float:
    """The incumbent's error divided by a trial's, on the samples that the trial was scored on."""
    error = sum(trial.intermediate_values.values())
    best = sum(incumbent.intermediate_values[index] for index in trial.intermediate_values)
    return best / error if error > 0 else 1.0
