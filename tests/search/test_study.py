"""The study on a problem with known truth: what it tries, what it keeps, and how it continues after a stop."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.policy import Choice
from bitpolicy.search.budget import BudgetError
from bitpolicy.search.generation import Score
from bitpolicy.search.knapsack import Solution
from bitpolicy.search.problem import Problem
from bitpolicy.search.quality.objective import MSE, Objective
from bitpolicy.search.study.journal import journal
from bitpolicy.search.study.samplers import policy_key
from bitpolicy.search.study.study import Study, open_storage
from bitpolicy.sensitivity.samples import Sample

Samples = list[Sample]
NewGenerations = Callable[..., Any]


def new_study(
    problem: Problem, generations: Any, samples: Samples, path: Path, name: str = "s", seed: int = 0
) -> Study:
    return Study(problem, generations, samples, journal(str(path)), name, seed)


def nbytes(problem: Problem, choices: Mapping[str, Choice]) -> int:
    return problem.account.total({name: choice.format for name, choice in choices.items()})


def exact(problem: Problem) -> dict[str, Choice]:
    return problem.choices(problem.solve())


def suggested(study: Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.finished]


# The problem


def test_the_exact_solution_fits_and_no_single_change_improves_it(problem: Problem) -> None:
    solution = problem.solve()
    choices = problem.choices(solution)
    assert nbytes(problem, choices) <= problem.budget
    assert nbytes(problem, choices) == problem.account.fixed + solution.nbytes
    error = sum(problem.table.score(i, choice.format) for i, choice in enumerate(choices.values()))
    assert solution.error == pytest.approx(error)
    for i, name in enumerate(choices):
        for format in problem.formats:
            other = choices | {name: Choice(format)}
            gained = problem.table.score(i, choices[name].format) - problem.table.score(i, format)
            assert gained <= 1e-4 * error or nbytes(problem, other) > problem.budget


def test_a_multiplier_moves_bytes_to_its_group(problem: Problem) -> None:
    def size(multipliers: dict[str, float]) -> int:
        choices = problem.choices(problem.solve(multipliers))
        return sum(
            problem.account.layer(n, c.format)
            for n, c in choices.items()
            if n.startswith("middle") and n.endswith("conv")
        )

    assert size({"conv/middle": 1000.0}) > size({"conv/middle": 1e-3})
    assert problem.choices(problem.solve(dict.fromkeys(problem.groups, 7.0))) == exact(problem)
    assert problem.choices(problem.solve({"no such group": 7.0})) == exact(problem)


def test_a_problem_without_a_solution_names_the_smallest_size(problem: Problem) -> None:
    with pytest.raises(BudgetError, match="below the smallest policy"):
        replace(problem, budget=problem.account.fixed + 10).solve()


# What a study tries


def test_the_first_trial_is_the_exact_solution(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    generations = new_generations()
    study = new_study(problem, generations, samples, tmp_path / "journal")
    study.run(1)
    ((choices, seen),) = generations.asked
    assert choices == exact(problem)
    assert set(seen) == set(samples)
    assert suggested(study) == [dict.fromkeys(problem.groups, 0.0)]
    errors = list(new_generations().errors(choices, samples))
    assert study.finished[0].value == pytest.approx(sum(errors) / len(errors))


def test_every_tried_policy_fits_the_budget(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    generations = new_generations()
    new_study(problem, generations, samples, tmp_path / "journal").run(20)
    tried = [choices for choices, _ in generations.asked]
    assert max(nbytes(problem, choices) for choices in tried) <= problem.budget
    assert len({tuple(choice.format.name for choice in choices.values()) for choices in tried}) > 5


def test_a_study_improves_on_a_wrong_table(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    generations = new_generations()
    study = new_study(problem, generations, samples, tmp_path / "journal")
    study.run(25)
    totals = [generations.total(choices) for choices in study.best(3)]
    assert totals[0] < generations.total(exact(problem))


def test_no_policy_is_scored_twice(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    generations = new_generations()
    new_study(problem, generations, samples, tmp_path / "journal").run(20)
    seen = [
        (tuple(choice.format.name for choice in choices.values()), sample)
        for choices, taken in generations.asked
        for sample in taken
    ]
    assert len(seen) == len(set(seen))


def test_a_losing_trial_is_stopped_early(problem: Problem, new_generations: NewGenerations, tmp_path: Path) -> None:
    samples, generations = [Sample("cat", seed) for seed in range(16)], new_generations()
    study = new_study(problem, generations, samples, tmp_path / "journal")
    study.run(20)
    scored = [trial.user_attrs["samples"] for trial in study.finished]
    assert scored[0] == 16
    assert 4 <= min(scored) < 16


def test_a_trial_of_a_known_policy_finishes_at_once_with_the_known_result(
    problem: Problem,
    new_generations: NewGenerations,
    samples: Samples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in another worker, and without the pruner, which is slow if all differences are zero."""
    new_study(problem, new_generations(), samples, tmp_path / "journal").run(1)
    optuna.load_study(study_name="s", storage=journal(str(tmp_path / "journal"))).enqueue_trial(
        dict.fromkeys(problem.groups, 0.0)
    )

    def never(*_: Any) -> Any:
        raise AssertionError("the pruner was asked")

    monkeypatch.setattr(optuna.pruners.WilcoxonPruner, "prune", never)
    generations = new_generations()
    study = new_study(problem, generations, samples, tmp_path / "journal")
    study.run(2)
    first, second = study.finished
    assert generations.asked == []
    assert second.value == first.value
    assert second.intermediate_values == first.intermediate_values
    assert second.user_attrs["repeats"] == first.number
    assert second.user_attrs["samples"] == len(samples)


def test_a_trial_describes_its_policy(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    """For optuna-dashboard."""
    generations = new_generations()
    study = new_study(problem, generations, samples, tmp_path / "journal")
    study.run(6)
    taken = {tuple(c.format.name for c in choices.values()): choices for choices, _ in generations.asked}
    for trial in study.finished:
        names = tuple(problem.formats[int(letter)].name for letter in trial.user_attrs["policy"])
        choices = taken[names]
        assert trial.user_attrs["policy_bytes"] == nbytes(problem, choices)
        for format in problem.formats:
            assert trial.user_attrs[f"layers_{format.name}"] == names.count(format.name)
        predicted = sum(problem.table.score(i, choice.format) for i, choice in enumerate(choices.values()))
        assert trial.user_attrs["predicted_error"] == pytest.approx(predicted)
        errors = trial.intermediate_values.values()
        assert len(errors) == trial.user_attrs["samples"]
        assert trial.user_attrs["psnr_db"] == pytest.approx(sum(-10 * math.log10(e) for e in errors) / len(errors))
    shown = optuna.load_study(study_name="s", storage=journal(str(tmp_path / "journal")))
    assert shown.metric_names == ["mean squared image error"]
    assert shown.user_attrs["budget_bytes"] == problem.budget


def test_a_study_is_named_after_its_objective(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    objective = Objective("ssim", "1 - SSIM", lambda a, b: 0.0)
    new_study(problem, new_generations(objective=objective), samples, tmp_path / "journal")
    shown = optuna.load_study(study_name="s", storage=journal(str(tmp_path / "journal")))
    assert shown.metric_names == ["1 - SSIM"]
    assert shown.user_attrs["objective"] == "ssim"


# What it keeps


def test_a_policy_has_an_origin(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    given = problem.solve({"conv/middle": 1000.0})
    study = Study(problem, new_generations(), samples, journal(str(tmp_path / "j")), "s", 0, starts=[given])
    study.run(12)
    assert study.origin(exact(problem)) == "the exact solution"
    assert study.origin(problem.choices(given)) == "start 1"
    others = [choices for choices in study.best(12) if choices not in (exact(problem), problem.choices(given))]
    keys = {trial.number: trial.user_attrs["policy"] for trial in study.finished}
    for choices in others:
        name, number = study.origin(choices).split()
        assert name == "trial"
        key = "".join(str(problem.formats.index(choice.format)) for choice in choices.values())
        assert int(number) == min(n for n, other in keys.items() if other == key)


def test_the_best_are_distinct_policies_scored_on_every_sample(
    problem: Problem, new_generations: NewGenerations, tmp_path: Path
) -> None:
    samples, generations = [Sample("cat", seed) for seed in range(16)], new_generations()
    study = new_study(problem, generations, samples, tmp_path / "journal")
    study.run(20)
    taken: dict[tuple[str, ...], set[Sample]] = {}
    for choices, seen in generations.asked:
        taken.setdefault(tuple(c.format.name for c in choices.values()), set()).update(seen)
    assert min(len(seen) for seen in taken.values()) < 16  # some trials lost and must be left out
    best = study.best(3)
    assert 1 <= len(best) <= 4
    names = [tuple(c.format.name for c in choices.values()) for choices in best]
    assert len(set(names)) == len(names)
    assert all(len(taken[name]) == 16 for name in names)
    totals = [generations.total(choices) for choices in best[:3]]
    assert totals == sorted(totals)


def test_a_partially_scored_policy_is_not_among_the_best(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    """However good it was on a few samples."""
    study = new_study(problem, new_generations(), samples, tmp_path / "journal")
    study.run(1)
    octaves = {group: 3.0 if group.startswith("conv") else -3.0 for group in problem.groups}
    formats = problem.solve({group: 2.0**value for group, value in octaves.items()}).formats
    lucky = problem.choices(Solution(formats, 0.0, 0, 0.0))
    assert lucky != exact(problem)
    raw = optuna.load_study(study_name="s", storage=journal(str(tmp_path / "journal")))
    for seen in (len(samples) - 1, len(samples)):
        raw.add_trial(
            optuna.create_trial(
                params=octaves,
                distributions=dict.fromkeys(octaves, optuna.distributions.FloatDistribution(-3.0, 3.0)),
                value=0.0,
                user_attrs={"samples": seen, "policy": policy_key(formats)},
            )
        )
        assert (lucky in study.best(3)) == (seen == len(samples))


@pytest.mark.parametrize("trials", [1, 2, 12])
@pytest.mark.parametrize("count", [1, 3])
def test_the_exact_solution_is_always_among_the_best(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path, trials: int, count: int
) -> None:
    study = new_study(problem, new_generations(), samples, tmp_path / "journal")
    study.run(trials)
    best = study.best(count)
    assert exact(problem) in best
    assert len(best) <= count + 1
    if len(best) == count + 1:
        assert best[-1] == exact(problem)


# Stopping and continuing


def test_a_study_continues_to_the_requested_number_of_trials(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    ticks: list[int] = []
    for asked, finished in ((3, 3), (5, 5), (5, 5), (4, 5)):
        study = new_study(problem, new_generations(), samples, tmp_path / "journal")
        study.run(asked, after_each=lambda: ticks.append(1))
        assert len(study.finished) == len(ticks) == finished


def test_a_study_in_two_runs_equals_the_study_in_one(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    whole = new_study(problem, new_generations(), samples, tmp_path / "whole")
    whole.run(14)
    for trials in (5, 14):
        parts = new_study(problem, new_generations(), samples, tmp_path / "parts")
        parts.run(trials)
    assert suggested(parts) == suggested(whole)
    assert [t.value for t in parts.finished] == [t.value for t in whole.finished]
    assert parts.best(3) == whole.best(3)


@pytest.mark.parametrize("errors", [0, 3, 8, 20])
def test_an_interrupted_study_ends_like_an_uninterrupted_one(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path, errors: int
) -> None:
    whole = new_study(problem, new_generations(), samples, tmp_path / "whole")
    whole.run(12)
    stopped = new_study(problem, new_generations(stop_after=errors), samples, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.run(12)
    assert len(stopped.finished) < 12
    resumed = new_study(problem, new_generations(), samples, tmp_path / "stopped")
    resumed.run(12)
    assert len(resumed.finished) == 12
    assert suggested(resumed) == suggested(whole)
    assert resumed.best(3) == whole.best(3)


def test_a_trial_left_running_by_a_killed_process_is_not_waited_for(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    """A process killed in its first trial leaves it in the journal, started but never finished."""
    whole = new_study(problem, new_generations(), samples, tmp_path / "whole")
    whole.run(4)
    new_study(problem, new_generations(), samples, tmp_path / "killed")
    raw = optuna.load_study(study_name="s", storage=journal(str(tmp_path / "killed")))
    raw.enqueue_trial(dict.fromkeys(problem.groups, 0.0))
    raw.ask()
    assert [trial.state for trial in raw.trials] == [TrialState.RUNNING]
    resumed = new_study(problem, new_generations(), samples, tmp_path / "killed")
    resumed.run(4)
    assert suggested(resumed) == suggested(whole)
    assert resumed.best(3) == whole.best(3)


def test_equal_seeds_give_equal_suggestions(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    def run(path: str, seed: int) -> list[dict[str, Any]]:
        study = new_study(problem, new_generations(), samples, tmp_path / path, seed=seed)
        study.run(12)
        return suggested(study)

    assert run("a", 0) == run("b", 0)
    assert run("c", 5)[1:] != run("a", 0)[1:]


def test_studies_with_different_names_in_one_journal_are_separate(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    new_study(problem, new_generations(), samples, tmp_path / "journal", name="one").run(3)
    other = new_study(problem, new_generations(), samples, tmp_path / "journal", name="two")
    assert other.finished == []
    other.run(2)
    assert len(other.finished) == 2


def test_images_with_nan_end_the_study(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    class Broken:
        tried = 0

        objective = MSE

        def scores(self, _choices: Any, samples: Samples) -> Generator[Score, None, None]:
            self.tried += 1
            if self.tried > 5:
                raise RuntimeError("tried again and again")
            return (Score(float("nan"), float("nan")) for _ in samples)

    with pytest.raises(BitPolicyError):
        new_study(problem, Broken(), samples, tmp_path / "journal").run(1)


def test_an_unknown_storage_is_refused_with_an_example(
    problem: Problem, new_generations: NewGenerations, samples: Samples
) -> None:
    with pytest.raises(BitPolicyError, match=r"storage 'nowhere'.* e\.g\. sqlite:///study\.db"):
        Study(problem, new_generations(), samples, "nowhere", "s", 0)


def test_a_storage_behind_a_proxy_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BitPolicyError, match=r"pip install 'bitpolicy\[grpc\]'"):
        open_storage("grpc://localhost:13000")


def test_a_worker_waits_for_tables_that_another_one_is_creating(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = iter([RuntimeError("table studies already exists"), RuntimeError("type x already exists")])
    get_storage = optuna.storages.get_storage

    def collide(url: str) -> Any:
        for error in calls:
            raise error
        return get_storage(url)

    monkeypatch.setattr(optuna.storages, "get_storage", collide)
    assert open_storage(f"sqlite:///{tmp_path}/study.db").get_all_studies() == []
    monkeypatch.setattr(optuna.storages, "get_storage", lambda _: next(iter([])))
    with pytest.raises(BitPolicyError):
        open_storage("sqlite:///nowhere")


def test_any_optuna_storage_works(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    Study(problem, new_generations(), samples, url, "s", 0).run(2)
    assert len(Study(problem, new_generations(), samples, url, "s", 0).finished) == 2
