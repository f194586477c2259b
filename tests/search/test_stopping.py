"""A study stops when its trials say that more of them are not worth their time, and says the same thing everywhere."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy import integrate, stats

from bitpolicy.search.problem import Problem
from bitpolicy.search.study.journal import journal
from bitpolicy.search.study.stopping import WORTH, expected_gain, in_turn, verdict
from bitpolicy.search.study.study import Study
from bitpolicy.sensitivity.samples import Sample

Samples = list[Sample]
NewGenerations = Callable[..., Any]
Workers = Callable[..., list[subprocess.Popen[str]]]
DB = 10 / math.log(10)
ASKED = 40


@pytest.fixture
def right(problem: Problem, new_generations: NewGenerations) -> Callable[..., Any]:
    """Makes generations whose errors are exactly those of the table, so that nothing beats the exact solution."""

    def new(**settings: Any) -> Any:
        generations = new_generations(**settings)
        generations.true_error = problem.table.error
        return generations

    return new


def new_study(problem: Problem, generations: Any, samples: Samples, path: Path, **settings: Any) -> Study:
    return Study(problem, generations, samples, journal(str(path)), "s", 0, **settings)


# What is predicted


@pytest.mark.parametrize("left", [1, 15])
@pytest.mark.parametrize(
    "ratios",
    [(0.8, 0.7, 0.9, 0.75, 0.72), (0.1, 1.3, 0.9, 0.2, 1.1, 0.4), (0.95, 1.0, 1.1), (0.2, 0.21, 0.19, 0.2)],
)
def test_the_gain_is_the_integral_of_what_students_t_predicts(ratios: tuple[float, ...], left: int) -> None:
    count, mean, spread = len(ratios), np.mean(ratios), np.std(ratios, ddof=1)
    predicted = stats.t(count - 1, loc=mean, scale=spread * math.sqrt(1 + 1 / count))
    above, _ = integrate.quad(lambda c: (c - 1) * predicted.pdf(c), 1, math.inf, limit=500)
    assert expected_gain(ratios, left) == pytest.approx(DB * left * above, rel=1e-4, abs=1e-12)


def test_trials_without_spread_gain_what_each_of_them_did() -> None:
    assert expected_gain([0.5] * 6, 10) == 0
    assert expected_gain([1.0] * 6, 10) == 0
    assert expected_gain([1.5] * 6, 10) == pytest.approx(DB * 10 * 0.5)


def test_n_trials_gain_no_more_than_the_bound_on_average() -> None:
    """Simulated: the best of n independent ones."""
    ratios = [0.7, 0.85, 0.6, 0.9, 0.75, 0.8, 0.72]
    spread = np.std(ratios, ddof=1) * math.sqrt(1 + 1 / len(ratios))
    drawn = np.mean(ratios) + spread * stats.t(len(ratios) - 1).rvs((20000, 12), random_state=0)
    gain = DB * np.maximum(drawn.max(axis=1) - 1, 0).mean()
    assert 0.5 * gain < gain <= expected_gain(ratios, 12)


# The verdict


def trial(number: int, errors: dict[int, float], turn: int | None = None) -> FrozenTrial:
    value = sum(errors.values()) / len(errors)
    made = create_trial(
        value=value, intermediate_values=errors, user_attrs={"turn": number if turn is None else turn, "samples": 2}
    )
    made.number = number
    return made


def whole(*factors: float) -> list[FrozenTrial]:
    """Trials on two samples; a factor of 1 is the error of the first one."""
    return [trial(n, {0: 1.0 * factor, 1: 3.0 * factor}) for n, factor in enumerate(factors)]


FAR = (1.0, 1.5, 1.6, 1.4, 1.55, 1.45)


def test_five_suggestions_that_are_far_worse_stop_a_study() -> None:
    assert [verdict(whole(*FAR[:count]), 1, 2, ASKED) for count in range(1, 6)] == [None] * 5
    found = verdict(whole(*FAR), 1, 2, ASKED)
    assert found is not None
    assert (found.trials, found.left, found.best) == (6, 34, 0)
    assert found.nearest_db == pytest.approx(-10 * math.log10(1.4))
    assert found.gain_db == expected_gain([1 / factor for factor in FAR[1:]], 34) < WORTH


def test_suggestions_that_come_close_do_not() -> None:
    assert verdict(whole(1.0, 1.3, 1.02, 1.4, 1.1, 1.05), 1, 2, ASKED) is None


def test_given_starts_say_nothing_about_suggestions() -> None:
    assert verdict(whole(1.0, *FAR), 2, 2, ASKED) is not None
    assert verdict(whole(1.0, *FAR[1:]), 2, 2, ASKED) is None, "four suggestions are too few"


def test_a_trial_is_compared_on_the_samples_that_it_was_scored_on() -> None:
    """On sample 0 every trial has 1.5 times the error; its mean is below the first one's, which has a hard sample."""
    trials = [trial(0, {0: 1.0, 1: 9.0}), *(trial(n, {0: 1.5 + 0.01 * n}) for n in range(1, 6))]
    assert trials[1].value is not None
    assert trials[0].value is not None
    assert trials[1].value < trials[0].value
    found = verdict(trials, 1, 2, ASKED)
    assert found is not None
    assert found.best == 0
    assert found.nearest_db == pytest.approx(-10 * math.log10(1.51))


def test_identical_images_cannot_be_improved() -> None:
    found = verdict(whole(0.0, *FAR[1:]), 1, 2, ASKED)
    assert found is not None
    assert (found.gain_db, found.nearest_db) == (0, None)


def test_nothing_stops_without_a_trial_on_every_sample_or_without_trials_to_save() -> None:
    partial = [trial(n, {0: 1.0 + 0.5 * bool(n) + 0.01 * n}) for n in range(7)]
    assert verdict(partial, 1, 2, ASKED) is None
    assert verdict(whole(*FAR), 1, 2, len(FAR)) is None


def test_the_more_trials_are_asked_for_the_later_it_stops() -> None:
    """So a study that continues with more trials is the one that would have been asked for at once."""
    draw = np.random.default_rng(0)
    stops = 0
    for _ in range(50):
        factors = 1 / draw.normal(0.75, 0.1, 30).clip(0.3, 2)
        trials = whole(1.0, *factors)
        first = [
            next((count for count in range(1, 31) if verdict(trials[:count], 1, 2, asked)), asked)
            for asked in (12, 24, 96)
        ]
        stops += first[0] < 12
        assert first == sorted(first)
    assert stops > 10


def test_only_the_first_turns_without_a_gap_count() -> None:
    trials = [trial(number, {0: 1.0}, turn) for number, turn in ((0, 0), (1, 2), (2, 1), (4, 4), (5, 5))]
    assert [one.number for one in in_turn(trials)] == [0, 2, 1]
    assert in_turn(trials[1:]) == []


# Whole studies


def test_a_study_of_a_right_table_stops_early_with_the_exact_solution(
    problem: Problem, right: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    study = new_study(problem, right(), samples, tmp_path / "journal")
    found = study.run(ASKED, every_trial=False)
    assert found is not None
    assert 6 <= found.trials == len(study.finished) < ASKED / 2
    assert study.best(1) == [problem.choices(problem.solve())]
    assert study.origin_of(found.best) == "the exact solution"
    assert found.nearest_db is not None
    assert found.nearest_db < 0


def test_every_trial_runs_if_asked_to(
    problem: Problem, right: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    """Also after the study stopped, as if it had not."""
    study = new_study(problem, right(), samples, tmp_path / "journal")
    assert study.run(16, every_trial=False) is not None
    assert len(study.finished) < 16
    assert study.run(16) is None
    at_once = new_study(problem, right(), samples, tmp_path / "at once")
    at_once.run(16)
    assert [(t.params, t.value) for t in study.finished] == [(t.params, t.value) for t in at_once.finished]


def test_studies_of_wrong_tables_keep_most_of_what_all_trials_gain(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    """The errors of each group are wrong by a factor of up to 16, differently in each study."""
    kept, gained, ran = 0.0, 0.0, 0
    for seed in range(6):
        draw = np.random.default_rng(seed)
        factor = dict(zip(problem.groups, 16 ** draw.uniform(-1, 1, len(problem.groups)), strict=True))
        generations = new_generations()
        wrong = torch.tensor([[factor[layer.group]] for layer in problem.inventory])
        generations.true_error = problem.table.error * wrong
        study = new_study(problem, generations, samples, tmp_path / str(seed))
        exact = generations.total(problem.choices(problem.solve()))
        study.run(24, every_trial=False)
        ran += len(study.finished)
        kept += 10 * math.log10(exact / generations.total(study.best(1)[0]))
        study.run(24)
        gained += 10 * math.log10(exact / generations.total(study.best(1)[0]))
    assert gained > 6 * 0.5
    assert kept > 0.7 * gained
    assert ran > 6 * 14


@pytest.mark.parametrize("errors", [3, 20, 30])
def test_a_killed_study_comes_to_the_same_verdict(
    problem: Problem, right: NewGenerations, samples: Samples, tmp_path: Path, errors: int
) -> None:
    whole = new_study(problem, right(), samples, tmp_path / "whole")
    expected = whole.run(ASKED, every_trial=False)
    with pytest.raises(KeyboardInterrupt):
        new_study(problem, right(stop_after=errors), samples, tmp_path / "stopped").run(ASKED, every_trial=False)
    resumed = new_study(problem, right(), samples, tmp_path / "stopped")
    found = resumed.run(ASKED, every_trial=False)
    assert found is not None
    assert expected is not None
    assert (found.trials, found.gain_db, found.nearest_db) == (expected.trials, expected.gain_db, expected.nearest_db)
    assert [(t.params, t.value) for t in resumed.finished] == [(t.params, t.value) for t in whole.finished]
    again = new_study(problem, right(stop_after=0), samples, tmp_path / "stopped")  # a stopped study draws nothing
    assert again.run(ASKED, every_trial=False) == found


def test_a_study_with_more_trials_after_it_stopped_is_the_one_asked_for_at_once(
    problem: Problem, right: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    for asked in (12, 60):
        parts = new_study(problem, right(), samples, tmp_path / "parts")
        found = parts.run(asked, every_trial=False)
    whole = new_study(problem, right(), samples, tmp_path / "whole")
    assert found == whole.run(60, every_trial=False)
    assert [t.params for t in parts.finished] == [t.params for t in whole.finished]


def test_workers_stop_together(
    new_workers: Workers, problem: Problem, right: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    """Each prints the same best policy and the same number of trials; a third one adds none."""
    url = f"journal:///{tmp_path}/journal"
    outputs = []
    for worker in new_workers(url, count=2, trials=ASKED, seconds=0.02, every_trial=False):
        out, err = worker.communicate(timeout=200)
        assert worker.returncode == 0, err[-3000:]
        outputs.append(out.split())
    assert outputs[0] == outputs[1]
    study = Study(problem, right(stop_after=0), samples, url, "s", 0)
    ran = len(study.finished)
    assert int(outputs[0][1]) == ran < ASKED
    found = study.run(ASKED, every_trial=False)
    assert found is not None
    assert found.trials <= ran == len(study.finished)
    decided = max(trial.datetime_complete for trial in in_turn(study.finished)[: found.trials])
    late = [trial for trial in study.finished if trial.datetime_start > decided]
    assert len(late) <= 2, "a worker begins at most one more trial between the verdict and reading it"
    assert len(study._study.get_trials(states=(TrialState.RUNNING,))) == 0
