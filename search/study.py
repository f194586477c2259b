"""The Optuna study: bend the exact solution towards what real generations say.

A trial suggests one multiplier a group of layers (role x stage); the knapsack decodes the bent errors into a policy, so
every trial fits the budget. A trial is scored by its mean image error over the search samples, reported sample by
sample, and `WilcoxonPruner` (made for paired scores) stops losers early. The exact solution is the first trial: the
result is never worse than it on the samples the study saw.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import optuna
from optuna.pruners import WilcoxonPruner
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.policy import Choice
from bitpolicy.search.generation import Generations
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.samples import Sample

_OCTAVES = 3.0  # a group's error is bent by at most 2 to this power either way
Choices = Mapping[str, Choice]


class Study:
    """One resumable study of one problem.

    Args:
        problem: what is to be decided.
        generations: what scores a trial.
        samples: the search samples.
        storage: an Optuna storage URL, or the path of a journal file.
        name: of the study in its storage; a study of that name is continued.
        seed: of the sampler.
    """

    def __init__(
        self,
        problem: Problem,
        generations: Generations,
        samples: Sequence[Sample],
        storage: str | BaseStorage,
        name: str,
        seed: int,
    ) -> None:
        self._problem, self._generations, self._samples = problem, generations, list(samples)
        self._seen: dict[tuple[str, ...], dict[int, float]] = {}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._seed = seed
        self._study = optuna.create_study(
            storage=open_storage(storage) if isinstance(storage, str) else storage,
            study_name=name,
            load_if_exists=True,
            direction="minimize",
            pruner=WilcoxonPruner(p_threshold=0.1, n_startup_steps=4),
        )

    def run(self, trials: int, after_each: Callable[[], None] = lambda: None) -> None:
        """Run until `trials` trials are finished in all, those of earlier runs included.

        Each trial has a sampler seeded by how many are finished, so that a run that was stopped suggests what it would
        have suggested without the stop.
        """
        while (done := len(self.finished)) < trials:
            if done == 0 and not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                self._study.enqueue_trial(dict.fromkeys(self._problem.groups, 0.0))  # the exact solution
            self._study.sampler = TPESampler(seed=self._seed + done)
            self._study.optimize(functools.partial(self._score, done), n_trials=1)
            after_each()

    @property
    def finished(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def best(self, count: int) -> list[Choices]:
        """The `count` best different policies scored on every sample, best first.

        The exact solution comes last if it is not among them.
        """
        whole = [trial for trial in self.finished if trial.user_attrs["samples"] == len(self._samples)]
        ranked = [trial.params for trial in sorted(whole, key=lambda t: (t.value, t.number))]
        found: list[Choices] = []
        for params in [*ranked, {}]:
            choices = self._decode(params)
            if choices not in found and (len(found) < count or not params):
                found.append(choices)
        return found

    def _decode(self, octaves: Mapping[str, Any]) -> dict[str, Choice]:
        return self._problem.choices(self._problem.solve({group: 2.0**value for group, value in octaves.items()}))

    def _score(self, done: int, trial: Trial) -> float:
        choices = self._decode(
            {group: trial.suggest_float(group, -_OCTAVES, _OCTAVES) for group in self._problem.groups}
        )
        order = list(range(len(self._samples)))
        random.Random(done).shuffle(order)
        scores: list[float] = []
        with closing(self._errors(choices, order)) as errors:  # a stopped trial must not leave its weights behind
            for index, error in zip(order, errors, strict=True):
                scores.append(error)
                trial.report(error, index)
                if not np.isfinite(error) or trial.should_prune():
                    break
        if not np.isfinite(scores).all():
            raise BitPolicyError("a policy's images are not finite; try --dtype bfloat16 or float32")
        trial.set_user_attr("samples", len(scores))
        return float(np.mean(scores))  # of a stopped loser too: an estimate the sampler can learn from

    def _errors(self, choices: Choices, order: Sequence[int]) -> Generator[float, None, None]:
        """Errors of the samples in `order`; what an equal policy measured before is not measured again."""
        known = self._seen.setdefault(tuple(choice.format.name for choice in choices.values()), {})
        missing = [self._samples[index] for index in order if index not in known]
        with closing(self._generations.errors(choices, missing)) as measured:
            for index in order:
                if index not in known:
                    known[index] = next(measured)
                yield known[index]


def open_storage(url: str) -> BaseStorage:
    """The storage behind an Optuna URL.

    Raises:
        BitPolicyError: Optuna cannot open it.
    """
    try:
        return optuna.storages.get_storage(url)
    except Exception as error:
        raise BitPolicyError(
            f"Optuna cannot use storage {url!r}: {' '.join(str(error).split())}; give a URL it knows, e.g. sqlite:///study.db"
        ) from error


def journal(path: str) -> BaseStorage:
    """Optuna's journal-file storage: survives a kill, and several processes may share it."""
    return JournalStorage(JournalFileBackend(path))
