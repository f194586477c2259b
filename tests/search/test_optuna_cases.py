"""Optuna's own test cases, run on our journal and on the samplers as a study uses them.

Databases and the gRPC proxy are used unchanged, so Optuna's own tests cover them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import FrozenTrial

from bitpolicy.search.study.journal import journal
from bitpolicy.search.study.samplers import SAMPLERS, sampler_named


class TestJournal(StorageTestCase):
    """A journal whose last record was truncated: opening it puts that record aside, so it is a new one, too."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> BaseStorage:
        (tmp_path / "journal").write_bytes(b'{"op_code":4,"trial')
        return journal(str(tmp_path / "journal"))


class OneForEachTrial(BaseSampler):
    """Makes a new sampler for each trial, as a study does: only the storage remembers anything between trials."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._made: dict[int, BaseSampler] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler_of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler_of(trial).sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        return self._sampler_of(trial).sample_independent(study, trial, name, distribution)

    def _sampler_of(self, trial: FrozenTrial) -> BaseSampler:
        return self._made.setdefault(trial.number, sampler_named(self._name, 7 + trial.number, trial.number))


class LearnsAtOnce(OneForEachTrial):
    """Without the random first trials, since these cases expect a joint draw after one trial."""

    def _sampler_of(self, trial: FrozenTrial) -> BaseSampler:
        sampler = super()._sampler_of(trial)
        sampler._n_startup_trials = 0  # type: ignore[attr-defined] # which `sampler_named` leaves to Optuna
        return sampler


def parametrized(*names: str, made: Callable[[str], BaseSampler] = OneForEachTrial) -> Any:
    """Optuna's cases call the fixture `sampler` to get a new sampler."""
    needs_cmaes = pytest.mark.skipif(
        importlib.util.find_spec("cmaes") is None, reason="needs pip install 'bitpolicy[cmaes]'"
    )
    params = [pytest.param(name, marks=[needs_cmaes] if name == "cmaes" else []) for name in names]

    @pytest.fixture(params=params)
    def sampler(self: object, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: made(request.param)

    return sampler


class TestEverySampler(BasicSamplerTestCase):
    sampler = parametrized(*SAMPLERS)


class TestSamplersThatDrawJointly(RelativeSamplerTestCase):
    """Not nsga2, which crosses parents and has none in the first generation; not random; and not gp, which is unchanged
    from Optuna and takes minutes."""

    sampler = parametrized("tpe", "cmaes", made=LearnsAtOnce)


class TestSamplersOfSeveralObjectives(MultiObjectiveSamplerTestCase):
    sampler = parametrized("tpe", "gp", "nsga2", "random")


class TestSamplersOfOneObjective(SingleOnlySamplerTestCase):
    sampler = parametrized("cmaes")
