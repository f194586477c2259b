"""How a policy was chosen, in words."""

from __future__ import annotations

from typing import Any

import pytest

from bitpolicy.workflow.decision import in_words

STUDY = {"exact_gap": 1e-5, "trials": 24, "finalists_mse": [2.0, 1.0]}


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ("the budget holds all of it unquantized", "the budget holds all of it unquantized"),
        ({"won": "the exact solution"}, "the exact solution"),
        ({"trials": 0, "finalists_mse": [], "won": "the exact solution"}, "the exact solution"),
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
