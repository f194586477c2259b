"""The smallest policy of a given quality, on curves whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitpolicy.search.knapsack import Solution
from bitpolicy.search.target import Reach

LEAST, MOST = 1000, 20000  # range of policy bytes; error falls by 6 dB per 1000


def error_of(nbytes: float) -> float:
    return float(10 ** (-0.6 * nbytes / 1000))


def smallest_within(error: float) -> Solution:
    nbytes = max(LEAST, math.ceil(round(-math.log10(error) / 0.6 * 1000, 6)))
    return Solution(np.zeros(1, dtype=np.int64), error_of(nbytes), nbytes, 0.0)


def search(quality: dict[str, float] | None = None, least: float = error_of(20000)) -> Reach:
    about = {"offset": 7.0, "bend": 0.0, "noise": 0.0, **(quality or {})}

    def measure(solution: Solution) -> float:
        db = -10 * math.log10(solution.error)
        wiggle = about["noise"] * math.sin(solution.nbytes)
        return about["offset"] + db + about["bend"] * math.sqrt(db) + wiggle

    return Reach(smallest_within, measure, error_of(1000), least)


def truth(target: float, **quality: float) -> int:
    found = search(dict(quality))
    sizes = range(LEAST, MOST + 1)
    return next(n for n in sizes if found.measure(smallest_within(error_of(n))) >= target)


@pytest.mark.parametrize("target", [20.0, 41.3, 77.0, 95.0])
@pytest.mark.parametrize("quality", [{}, {"offset": -11.0}, {"bend": 2.0}, {"bend": -1.5}], ids=str)
def test_it_is_within_half_a_percent_of_the_smallest(target: float, quality: dict[str, float]) -> None:
    looking = search(quality)
    found = looking.smallest(target)
    assert found is not None
    assert found.quality >= target
    if found.solution.nbytes > 1000:
        assert found.solution.nbytes <= truth(target, **quality) * 1.0051
    assert len(looking.measured) <= 9


def test_noise_in_the_measurements_does_not_hide_a_policy_that_reaches() -> None:
    found = search({"noise": 0.4}).smallest(50.0)
    assert found is not None
    assert found.quality >= 50.0
    assert found.solution.nbytes <= truth(50.0, offset=7.0) * 1.02


def test_the_smallest_policy_is_chosen_if_it_reaches_the_target() -> None:
    looking = search()
    found = looking.smallest(10.0)
    assert found is not None
    assert found.solution.nbytes == 1000
    assert len(looking.measured) == 1


def test_an_unreachable_target_is_reported_after_measuring_the_best_policy() -> None:
    looking = search(least=error_of(5000))
    assert looking.smallest(100.0) is None
    assert min(m.place for m in looking.measured) == pytest.approx(math.log10(error_of(5000)))


def test_a_second_target_reuses_measurements() -> None:
    looking = search()
    looking.smallest(50.0)
    before = len(looking.measured)
    found = looking.smallest(50.5)
    assert found is not None
    assert found.quality >= 50.5
    assert len(looking.measured) - before <= 3
