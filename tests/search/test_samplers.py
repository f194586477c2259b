"""Every sampler and space: all suggestions fit, starts come first, and an interruption changes nothing."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.policy import Choice
from bitpolicy.search.generation import Score
from bitpolicy.search.problem import Problem
from bitpolicy.search.study.journal import journal
from bitpolicy.search.study.samplers import SAMPLERS, SPACES, Space, formats_of, policy_key, require_sampler
from bitpolicy.search.study.study import Study
from bitpolicy.sensitivity.samples import Sample

Samples = list[Sample]
NewGenerations = Callable[..., Any]
NewStudy = Callable[..., Study]
INSTALLED = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "cmaes" and importlib.util.find_spec("cmaes") is None, reason="needs pip install 'bitpolicy[cmaes]'"
        ),
    )
    for name in SAMPLERS
]


@pytest.fixture
def new_study(problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path) -> NewStudy:
    """`new_study(file)`: a study in its own journal."""

    def new(file: str = "journal", stop_after: float = float("inf"), generations: Any = None, **settings: Any) -> Study:
        generations = generations or new_generations(stop_after=stop_after)
        return Study(problem, generations, samples, journal(str(tmp_path / file)), "s", 0, **settings)

    return new


@pytest.fixture
def repaired(problem: Problem) -> np.ndarray:
    """A policy that no multiplier gives: unlike the exact one, one layer is a format lower and another higher."""
    exact, sizes = problem.solve(), problem.sizes()
    layers = range(len(problem.inventory))
    for down, up in itertools.permutations(layers, 2):
        formats = exact.formats.copy()
        formats[down] -= 1
        formats[up] += 1
        within = formats.min() >= 0 and formats.max() < len(problem.formats)
        if within and int(sizes[layers, formats].sum()) <= exact.nbytes:
            return formats
    raise AssertionError("there is no such pair")


def tried(study: Study) -> list[str]:
    return [trial.user_attrs["policy"] for trial in study.finished]


def suggested(study: Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.finished]


def choices_of(problem: Problem, formats: np.ndarray) -> dict[str, Choice]:
    return problem.choices(replace(problem.solve(), formats=formats))


def nbytes(problem: Problem, choices: Mapping[str, Choice]) -> int:
    return problem.account.total({name: choice.format for name, choice in choices.items()})


# Every sampler


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("sampler", INSTALLED)
def test_every_suggestion_fits_and_the_starts_come_first(
    new_study: NewStudy, problem: Problem, repaired: np.ndarray, sampler: str, space: str
) -> None:
    study = new_study(sampler=sampler, space=space, starts=[choices_of(problem, repaired)])
    study.run(12)
    assert tried(study)[:2] == [policy_key(problem.solve().formats), policy_key(repaired)]
    policies = [choices_of(problem, formats_of(key)) for key in tried(study)]
    assert max(nbytes(problem, choices) for choices in policies) <= problem.budget
    assert len(set(tried(study))) > 6
    assert len({tuple(params.values()) for params in suggested(study)}) == 12


@pytest.mark.parametrize("sampler", INSTALLED)
def test_a_stopped_study_resumes_with_the_same_suggestions(
    new_study: NewStudy, repaired: np.ndarray, problem: Problem, sampler: str
) -> None:
    starts = [choices_of(problem, repaired)]
    whole = new_study("whole", sampler=sampler, starts=starts)
    whole.run(22)
    for errors in (3, 90):
        stopped = new_study("stopped", stop_after=errors, sampler=sampler, starts=starts)
        with pytest.raises(KeyboardInterrupt):
            stopped.run(22)
    resumed = new_study("stopped", sampler=sampler, starts=starts)
    assert 2 < len(resumed.finished) < 22
    resumed.run(22)
    assert suggested(resumed) == suggested(whole)
    assert [trial.value for trial in resumed.finished] == [trial.value for trial in whole.finished]


@pytest.mark.parametrize("sampler", [p for p in INSTALLED if p.values[0] != "random"])
def test_a_sampler_learns_from_the_trials(new_study: NewStudy, new_generations: NewGenerations, sampler: str) -> None:
    """Other errors give other suggestions; the random sampler ignores them."""

    class Reversed:
        def __init__(self) -> None:
            self.scripted = new_generations()
            self.objective = self.scripted.objective

        def scores(self, choices: Any, samples: Samples) -> Any:
            return (Score(1 / score.distance, score.mse) for score in self.scripted.scores(choices, samples))

    one, other = new_study("one", sampler=sampler), new_study("other", sampler=sampler, generations=Reversed())
    for study in (one, other):
        study.run(24)
    assert suggested(one)[0] == suggested(other)[0]
    assert suggested(one) != suggested(other)


def test_octaves_decode_to_the_solution_with_the_same_multipliers(problem: Problem) -> None:
    names = [layer.name for layer in problem.inventory]
    tied = replace(problem, tied=[[names[i] for i in (0, 10, 20)], [names[i] for i in (5, 6)]])
    space = Space(tied, "group")
    octaves = {name: (-1.5, 0.5, 2.0)[i % 3] for i, name in enumerate(space.names)}
    expected = tied.solve({name: 2.0**value for name, value in octaves.items()})
    assert np.array_equal(space.suggest(optuna.trial.FixedTrial(octaves)), expected.formats)
    assert not np.array_equal(expected.formats, space.starts[0])


def test_an_unknown_sampler_is_refused_with_the_known_ones(new_study: NewStudy) -> None:
    with pytest.raises(
        BitPolicyError, match="unknown sampler 'annealing'; choose one of tpe, gp, cmaes, nsga2, random"
    ):
        new_study(sampler="annealing")


def test_a_sampler_with_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BitPolicyError, match=r"pip install 'bitpolicy\[cmaes\]'"):
        require_sampler("cmaes")
    for name in set(SAMPLERS) - {"cmaes"}:
        require_sampler(name)


# Spaces


def test_a_space_has_one_octave_per_group_or_per_row(problem: Problem) -> None:
    assert Space(problem, "group").names == problem.groups
    names = [layer.name for layer in problem.inventory]
    assert Space(problem, "layer").names == names
    tied = replace(problem, tied=[names[3:6]])
    assert Space(tied, "layer").names == [*names[:4], *names[6:]]


@pytest.mark.parametrize("space", SPACES)
def test_layers_that_share_a_format_keep_sharing_it(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path, space: str
) -> None:
    tied = replace(problem, tied=[[problem.inventory[i].name for i in (0, 10, 20)]])
    study = Study(tied, new_generations(), samples, journal(str(tmp_path / "j")), "s", 0, sampler="random", space=space)
    study.run(15)
    assert all(len({key[i] for i in (0, 10, 20)}) == 1 for key in tried(study))
    assert len({key[0] for key in tried(study)}) > 1


@pytest.mark.parametrize("space", SPACES)
def test_a_disallowed_format_is_never_tried(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path, space: str
) -> None:
    exact = problem.solve().formats
    here = int(np.flatnonzero(exact == 0)[0])
    pinned = replace(problem, pinned={problem.inventory[here].name: problem.formats[2]})
    study = Study(
        pinned, new_generations(), samples, journal(str(tmp_path / "j")), "s", 0, sampler="random", space=space
    )
    study.run(15)
    assert {key[here] for key in tried(study)} == {"2"}


def test_an_octave_of_a_layer_moves_bytes_to_it_from_the_others(problem: Problem) -> None:
    space = Space(problem, "layer")
    exact = space.starts[0]
    here = int(np.flatnonzero(exact == 0)[0])
    fixed = {**space.parameters(0), space.names[here]: 3.0}
    bent = space.suggest(optuna.trial.FixedTrial(fixed))
    assert bent[here] > exact[here]
    elsewhere = [i for i in range(len(exact)) if i != here]
    sizes = problem.sizes()[elsewhere]
    assert sizes[range(len(elsewhere)), bent[elsewhere]].sum() < sizes[range(len(elsewhere)), exact[elsewhere]].sum()


def test_a_study_is_not_continued_in_another_space(new_study: NewStudy) -> None:
    new_study(space="group").run(1)
    with pytest.raises(BitPolicyError, match="--space group"):
        new_study(space="layer")
    with pytest.raises(BitPolicyError, match="unknown space 'row'; choose one of group, layer"):
        new_study("other", space="row")


# Starts


def test_a_start_is_scored_unchanged_and_then_varied(problem: Problem, repaired: np.ndarray) -> None:
    space = Space(problem, "group", [choices_of(problem, repaired)])
    assert np.array_equal(space.suggest(optuna.trial.FixedTrial(space.parameters(0))), problem.solve().formats)
    assert np.array_equal(space.suggest(optuna.trial.FixedTrial(space.parameters(1))), repaired)
    kept = np.flatnonzero(repaired != problem.solve().formats)
    octaves = {name: 3.0 if name.startswith("conv") else -3.0 for name in space.names}
    bent = space.suggest(optuna.trial.FixedTrial({**octaves, "start": 1}))
    assert np.array_equal(bent[kept], repaired[kept])
    assert not np.array_equal(bent, repaired)
    assert nbytes(problem, choices_of(problem, bent)) <= problem.budget


def test_a_start_below_the_budget_is_scored_unchanged(problem: Problem) -> None:
    lean = problem.solve().formats.copy()
    here = int(np.flatnonzero(lean == 1)[-1])
    lean[here] = 0
    space = Space(problem, "group", [choices_of(problem, lean)])
    assert np.array_equal(space.suggest(optuna.trial.FixedTrial(space.parameters(1))), lean)
    slight = {**space.parameters(1), space.names[0]: 1e-9}
    assert not np.array_equal(space.suggest(optuna.trial.FixedTrial(slight)), lean)


def test_a_start_may_be_a_solution_and_duplicates_count_once(problem: Problem, repaired: np.ndarray) -> None:
    solution = replace(problem.solve(), formats=repaired)
    space = Space(problem, "group", [problem.solve(), solution, choices_of(problem, repaired)])
    assert len(space.starts) == 2
    assert np.array_equal(space.starts[1], repaired)
    assert "start" not in Space(problem, "group", [problem.solve()]).parameters(0)


def test_a_start_that_does_not_fit_is_refused(problem: Problem) -> None:
    with pytest.raises(BitPolicyError, match=r"a start of [\d,]+ bytes .* allows [\d,]+ bytes"):
        Space(problem, "group", [choices_of(problem, np.full(len(problem.inventory), 2))])


def test_a_start_is_scored_even_if_its_first_trial_was_stopped(
    new_study: NewStudy, problem: Problem, repaired: np.ndarray
) -> None:
    starts = [choices_of(problem, repaired)]
    with pytest.raises(KeyboardInterrupt):
        new_study(stop_after=10, starts=starts).run(5)
    resumed = new_study(starts=starts)
    assert tried(resumed) == [policy_key(problem.solve().formats)]
    resumed.run(5)
    assert tried(resumed)[1] == policy_key(repaired)
    assert tried(resumed).count(policy_key(repaired)) == 1
