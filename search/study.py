"""The Optuna study: bend the exact solution towards what real generations say.

A trial suggests one multiplier a group of layers (role x stage); the knapsack decodes the bent errors into a policy, so
every trial fits the budget. A trial is scored by its mean image error over the search samples, reported sample by
sample, and `WilcoxonPruner` (made for paired scores) stops losers early. The exact solution is the first trial: the
result is never worse than it on the samples the study saw.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.pruners import WilcoxonPruner
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.format import Format
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.policy import Choice
from bitpolicy.search.generation import Generations
from bitpolicy.search.knapsack import Solution, solve
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory import Sample

_OCTAVES = 3.0  # a group's error is bent by at most 2 to this power either way
Choices = Mapping[str, Choice]


@dataclass(frozen=True)
class Problem:
    """What is to be decided: a format for each layer, within bytes.

    Attributes:
        inventory: the layers, L of them.
        formats: the candidates, F of them, FP16 among them.
        table: their sensitivities.
        account: their bytes.
        budget: tensor bytes the whole denoiser may have.
    """

    inventory: Sequence[Layer]
    formats: Sequence[Format]
    table: SensitivityTable
    account: ByteAccount
    budget: int

    def solve(self, multipliers: Mapping[str, float] | None = None) -> Solution:
        """The exact solution, each group's errors multiplied first if `multipliers` has the group."""
        error = np.array([[self.table.score(i, f) for f in self.formats] for i in range(len(self.inventory))])
        if multipliers:
            error *= np.array([multipliers.get(layer.group, 1.0) for layer in self.inventory])[:, None]
        nbytes = np.array([[self.account.layer(layer.name, f) for f in self.formats] for layer in self.inventory])
        return solve(error, nbytes, self.budget - self.account.fixed)

    def choices(self, solution: Solution) -> dict[str, Choice]:
        """Layer name -> choice."""
        picked = [self.formats[index] for index in solution.formats]
        return {
            layer.name: self.table.choice(i, f) for i, (layer, f) in enumerate(zip(self.inventory, picked, strict=True))
        }

    @property
    def groups(self) -> list[str]:
        return sorted({layer.group for layer in self.inventory})


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
        try:
            self._study = optuna.create_study(
                storage=storage,
                study_name=name,
                load_if_exists=True,
                direction="minimize",
                sampler=TPESampler(seed=seed),
                pruner=WilcoxonPruner(p_threshold=0.1, n_startup_steps=4),
            )
        except Exception as error:
            raise BitPolicyError(
                f"Optuna cannot use storage {storage!r}: {error}; give a URL it knows, e.g. sqlite:///study.db"
            ) from error
        self._study.enqueue_trial(dict.fromkeys(problem.groups, 0.0), skip_if_exists=True)

    def run(self, trials: int, after_each: Callable[[], None] = lambda: None) -> None:
        """Run until `trials` trials are finished in all, those of earlier runs included."""
        after_each_trial = [lambda _study, _trial: after_each()]
        remaining = trials - len(self.finished)
        if remaining > 0:
            self._study.optimize(self._score, n_trials=remaining, callbacks=after_each_trial)

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

    def _score(self, trial: Trial) -> float:
        choices = self._decode(
            {group: trial.suggest_float(group, -_OCTAVES, _OCTAVES) for group in self._problem.groups}
        )
        order = list(range(len(self._samples)))
        random.Random(trial.number).shuffle(order)
        errors: list[float] = []
        for index, error in self._errors(choices, order):
            errors.append(error)
            trial.report(error, index)
            if trial.should_prune():
                break
        trial.set_user_attr("samples", len(errors))
        return float(np.mean(errors))  # of a stopped loser too: an estimate the sampler can learn from

    def _errors(self, choices: Choices, order: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Errors by sample index; what an equal policy measured before is not measured again."""
        known = self._seen.setdefault(tuple(choice.format.name for choice in choices.values()), {})
        yield from ((index, known[index]) for index in order if index in known)
        missing = [index for index in order if index not in known]
        measured = self._generations.errors(choices, [self._samples[index] for index in missing])
        for index, error in zip(missing, measured, strict=False):
            known[index] = error
            yield index, error


def journal(path: str) -> BaseStorage:
    """Optuna's journal-file storage: survives a kill, and several processes may share it."""
    return JournalStorage(JournalFileBackend(path))
