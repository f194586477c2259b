"""The time left: a forecast, corrected by the time that the stages took."""

from __future__ import annotations

import pytest

from bitpolicy.sensitivity.cost.progress import in_words
from bitpolicy.sensitivity.cost.time_left import TimeLeft


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(left: TimeLeft, clock: Clock, stage: str, seconds: float, items: int = 4) -> None:
    left.begin(stage)
    for i in range(items):
        clock.now += seconds / items
        left.reached((i + 1) / items)
    left.end()


def test_the_time_left_starts_as_the_forecast(clock: Clock) -> None:
    left = TimeLeft({"reference": 10, "probe": 30}, clock)
    assert left.seconds == pytest.approx(40)
    assert left.share == 0


def test_an_accurate_forecast_is_not_corrected(clock: Clock) -> None:
    left = TimeLeft({"reference": 10, "probe": 30}, clock)
    run(left, clock, "reference", 10)
    assert left.seconds == pytest.approx(30)
    assert left.share == pytest.approx(0.25)


def test_the_time_left_counts_down_between_items(clock: Clock) -> None:
    left = TimeLeft({"reference": 10, "probe": 30}, clock)
    left.begin("reference")
    clock.now = 3
    assert left.seconds == pytest.approx(37)


@pytest.mark.parametrize("pace", [0.5, 3.0])
def test_the_rest_follows_the_actual_pace(clock: Clock, pace: float) -> None:
    left = TimeLeft({"reference": 10, "probe": 30}, clock)
    run(left, clock, "reference", 10 * pace)
    low, high = sorted([30, 30 * pace])
    assert low < left.seconds < high
    left.begin("probe")
    clock.now += 15 * pace
    left.reached(0.5)
    assert abs(left.seconds - 15 * pace) < abs(15 - 15 * pace) / 4


def test_the_time_left_ends_at_zero(clock: Clock) -> None:
    left = TimeLeft({"reference": 10, "probe": 30}, clock)
    for stage in ("reference", "probe"):
        run(left, clock, stage, 7)
    assert left.seconds == 0
    assert left.share == pytest.approx(1)


def test_work_of_an_earlier_run_counts_as_done_but_not_for_the_pace(clock: Clock) -> None:
    left = TimeLeft({"reference": 10, "rounding": 20, "probe": 30}, clock)
    left.begin("probe")
    assert left.share == pytest.approx(0.5)
    assert left.seconds == pytest.approx(30)


def test_a_repeated_stage_does_not_reduce_the_finished_share(clock: Clock) -> None:
    left = TimeLeft({"probe": 10, "re-measuring": 8, "search": 30}, clock)
    for _ in range(3):
        run(left, clock, "re-measuring", 4)
    assert left.share == pytest.approx(18 / 48)


def test_a_stage_without_a_forecast_changes_nothing(clock: Clock) -> None:
    left = TimeLeft({"probe": 10}, clock)
    run(left, clock, "something else", 100)
    assert left.seconds == pytest.approx(10)


def test_more_items_than_expected_do_not_exceed_the_whole(clock: Clock) -> None:
    left = TimeLeft({"policies measured": 10}, clock)
    left.begin("policies measured")
    left.reached(1.5)
    assert left.share == 1


def test_an_empty_forecast_leaves_no_time(clock: Clock) -> None:
    left = TimeLeft({}, clock)
    assert (left.seconds, left.share) == (0, 0)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (6060, "1 h 41 min")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
