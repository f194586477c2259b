"""The final choice is the policy with the lowest error on fresh samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import pytest

from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.policy import Choice
from bitpolicy.search.generation import Generations, Score
from bitpolicy.search.study.finalists import confirm
from bitpolicy.sensitivity.samples import Sample

FINALISTS = [{"layer": Choice(format_named(name))} for name in ("int4", "int4-g32", "int8")] + [{"layer": Choice(FP16)}]
SAMPLES = [Sample("cat", 0), Sample("dog", 1)]


class Scripted:
    """Generations with known errors: one list per format."""

    def __init__(self, *errors: Sequence[float]) -> None:
        self._errors = {c["layer"].format.name: e for c, e in zip(FINALISTS, errors, strict=False)}
        self.asked: list[tuple[str, list[Sample]]] = []

    def scores(self, choices: Mapping[str, Choice], samples: Sequence[Sample]) -> Iterator[Score]:
        name = choices["layer"].format.name
        self.asked.append((name, list(samples)))
        yield from (Score(error, -1.0) for error in self._errors[name])  # the squared error decides nothing


def confirmed(generations: Any) -> Any:
    finalists = FINALISTS[: len(generations._errors)]
    return confirm(iter(finalists), cast("Generations", generations), SAMPLES)


def test_the_lowest_mean_error_wins() -> None:
    found = confirmed(Scripted([4.0, 0.0], [1.0, 2.0], [0.0, 9.0]))
    assert found.choices == FINALISTS[1]
    assert found.error == (2.0, 1.5, 4.5)


def test_the_earlier_of_two_equals_wins() -> None:
    assert confirmed(Scripted([9.0, 9.0], [1.0, 3.0], [3.0, 1.0], [2.0, 2.0])).choices == FINALISTS[1]


def test_a_single_finalist_wins() -> None:
    found = confirmed(Scripted([1.0, 2.0]))
    assert (found.choices, found.error) == (FINALISTS[0], (1.5,))


def test_a_leader_that_is_best_on_fresh_samples_is_confirmed() -> None:
    found = confirmed(Scripted([1.0, 1.0], [1.0, 2.0]))
    assert (found.won, found.held, found.leader_rank) == (0, True, 1)


def test_a_leader_that_is_not_best_on_fresh_samples_is_replaced() -> None:
    found = confirmed(Scripted([2.0, 2.0], [3.0, 3.0], [1.0, 1.0], [1.5, 1.5]))
    assert (found.won, found.held, found.leader_rank) == (2, False, 3)
    assert found.choices == FINALISTS[2]


def test_a_leader_that_ties_on_fresh_samples_is_confirmed() -> None:
    assert confirmed(Scripted([2.0, 2.0], [1.0, 3.0])).held


def test_every_finalist_is_scored_on_all_samples() -> None:
    generations = Scripted([1.0, 1.0], [0.0, 5.0])
    confirmed(generations)
    assert generations.asked == [("int4", SAMPLES), ("int4-g32", SAMPLES)]


def test_errors_are_not_rounded() -> None:
    assert confirmed(Scripted([1e-9, 1e-9], [1e-9, 0.999e-9])).choices == FINALISTS[1]


def test_without_finalists_there_is_nothing_to_confirm() -> None:
    with pytest.raises(ValueError, match="empty"):
        confirmed(Scripted())
