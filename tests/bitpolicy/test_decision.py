"""How a policy was chosen, in words."""

from __future__ import annotations

from typing import Any

import pytest

from bitpolicy.workflow.decision import in_words, why_stopped

STUDY = {"exact_gap": 1e-5, "trials": 24, "finalists": [2.0, 1.0]}


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ("the budget holds all of it unquantized", "the budget holds all of it unquantized"),
        ({"won": "the exact solution"}, "the exact solution"),
        ({"trials": 0, "finalists": [], "won": "the exact solution"}, "the exact solution"),
        (
            {**STUDY, "won": "trial 7", "best_of_study_held": True},
            "trial 7, the best of 24 trials; confirmed on fresh seeds",
        ),
        (
            {**STUDY, "won": "the exact solution", "best_of_study_held": False},
            "the exact solution; the best of 24 trials was worse on fresh seeds",
        ),
        (
            {"target": "45.00 dB", "search_samples": "45.20 dB", "fresh_seeds": "44.90 dB", "held": False},
            "the smallest policy with 45.00 dB; on fresh seeds it has 44.90 dB",
        ),
    ],
)
def test_the_winner_and_its_confirmation_are_in_words(about: Any, said: str) -> None:
    assert in_words(about) == said


STOPPED = {**STUDY, "trials": 10, "trials_asked": 24, "stopped": "unlikely to improve"}


def seen(nearest: float | None, trials: int = 9) -> dict[str, Any]:
    on = {"trials": trials, "best": "the exact solution", "nearest_db": nearest, "expected_gain_db": 0.083}
    return {**STOPPED, "stopped_on": on}


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ("the budget holds all of it unquantized", None),
        ({"trials": 0, "finalists": [], "won": "the exact solution"}, None),
        ({**STUDY, "won": "trial 7"}, None),  # of an older version
        ({**STUDY, "trials_asked": 24}, "all 24 trials ran"),
        (
            {**STOPPED, "stopped": "timeout"},
            "stopped after 10 of 24 trials: the time limit (--timeout)",
        ),
        (
            seen(-0.87),
            "stopped after 10 of 24 trials: none was within 0.8 dB of the exact solution; the other 14 are "
            "expected to gain at most 0.083 dB together (--all-trials runs them)",
        ),
        (
            seen(-0.02),
            "stopped after 10 of 24 trials: none was clearly better than the exact solution; the other 14 are "
            "expected to gain at most 0.083 dB together (--all-trials runs them)",
        ),
        (
            seen(None),
            "stopped after 10 of 24 trials: the exact solution draws the reference's images; the other 14 are "
            "expected to gain at most 0.083 dB together (--all-trials runs them)",
        ),
    ],
)
def test_a_study_says_why_it_stopped(about: Any, said: str | None) -> None:
    assert why_stopped(about) == said
