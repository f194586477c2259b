"""Search spaces and samplers: what a trial suggests, which policy that means, and which Optuna sampler suggests it.

A trial suggests octaves o and a start s. Its policy

    minimizes  sum_l 2^o(l) e(l, f_l)   subject to   sum_l bytes(l, f_l) <= budget,

over the layers where start s agrees with the exact solution; the other layers keep the start's formats. So every
suggestion fits the budget, and samplers need not handle constraints. If all octaves are zero, the policy is exactly the
start. Layers share an octave by group (role x stage) or, in space "layer", only with layers that share their format.
Even there, a trial suggests octaves and not formats: random formats ignore the table and land far from every good
policy, while octaves build on the table and change only the choices that it considers close.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    PartialFixedSampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.policy import Choice
from bitpolicy.search.knapsack import Solution, solve
from bitpolicy.search.problem import Problem

SAMPLERS: Final = ("tpe", "gp", "cmaes", "nsga2", "random")
SPACES: Final = ("group", "layer")
_OCTAVES = 3.0  # largest power of 2, up or down, by which an error is scaled
_POPULATION = 10  # of NSGA-II; with its default of 50, a usual study would end in the first, random generation
_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
Choices = Mapping[str, Choice]


class Space:
    """What the trials of one study may suggest.

    Args:
        problem: the search problem.
        kind: one of `SPACES`.
        starts: policies to try unchanged and to vary, in addition to the exact solution.

    Attributes:
        starts: int64, shape (layers) each; the exact solution, then every other start without duplicates.
        names: of the octaves.

    Raises:
        BitPolicyError: an unknown space, or a start that the problem does not allow.
    """

    def __init__(self, problem: Problem, kind: str, starts: Sequence[Solution | Choices] = ()) -> None:
        if kind not in SPACES:
            raise BitPolicyError(f"unknown space {kind!r}; choose one of {', '.join(SPACES)}")
        self._problem = problem
        self._errors, self._sizes, self._rows = problem.errors(), problem.sizes(), problem.rows()
        self.starts = [np.asarray(problem.solve().formats)]
        for start in starts:
            formats = self._checked(start)
            if not any(np.array_equal(formats, other) for other in self.starts):
                self.starts.append(formats)
        owners = [layer.group for layer in problem.inventory] if kind == "group" else self._row_names()
        self.names = sorted(set(owners)) if kind == "group" else list(dict.fromkeys(owners))
        self._octave = np.array([self.names.index(owner) for owner in owners])

    def suggest(self, trial: Trial) -> np.ndarray:
        """The policy that a trial should score: one format index per layer, int64, shape (layers)."""
        octaves = np.array([trial.suggest_float(name, -_OCTAVES, _OCTAVES) for name in self.names])
        last = len(self.starts) - 1
        return self._decode(octaves, trial.suggest_int("start", 0, last) if last else 0)

    def parameters(self, start: int) -> dict[str, float]:
        """The suggestions of a trial that scores a start unchanged."""
        octaves = dict.fromkeys(self.names, 0.0)
        return {**octaves, "start": start} if len(self.starts) > 1 else octaves

    def sampler(self, name: str, seed: int, turn: int) -> BaseSampler:
        """The sampler of one trial. The first trials score the starts."""
        sampler = sampler_named(name, seed + turn, turn)
        return _fixed(self.parameters(turn), sampler) if turn < len(self.starts) else sampler

    def predicted(self, formats: np.ndarray) -> Solution:
        """A policy with its predicted error and bytes."""
        place = np.arange(len(formats))
        error, nbytes = self._errors[place, formats].sum(), self._sizes[place, formats].sum()
        return Solution(formats, float(error), int(nbytes), 0.0)

    def formats(self, choices: Choices) -> np.ndarray:
        """A policy as one format index per layer, int64, shape (layers)."""
        return np.array([self._problem.formats.index(choices[layer.name].format) for layer in self._problem.inventory])

    def choices(self, formats: np.ndarray) -> dict[str, Choice]:
        """Layer name -> choice."""
        return self._problem.choices(self.predicted(formats))

    def described(self, formats: np.ndarray) -> dict[str, Any]:
        """What is stored about a trial's policy, as JSON values; optuna-dashboard shows it."""
        predicted, counts = self.predicted(formats), np.bincount(formats, minlength=len(self._problem.formats))
        return {
            "policy": policy_key(formats),
            "policy_bytes": predicted.nbytes + self._problem.account.fixed,
            "predicted_error": predicted.error,
            **{f"layers_{f.name}": int(n) for f, n in zip(self._problem.formats, counts, strict=True)},
        }

    def _decode(self, octaves: np.ndarray, start: int) -> np.ndarray:
        formats, exact = self.starts[start], self.starts[0]
        free = [row for row in self._rows if np.array_equal(formats[row], exact[row])]
        if not octaves.any() or not free:
            return formats
        bent = self._errors * 2.0 ** octaves[self._octave][:, None]
        error, nbytes = (self._problem.merged(matrix, free) for matrix in (bent, self._sizes))
        moving = np.concatenate(free)
        kept = self.predicted(formats).nbytes - int(self._sizes[moving, formats[moving]].sum())
        found = solve(error, nbytes, self._problem.budget - self._problem.account.fixed - kept)
        policy = formats.copy()
        for row, chosen in zip(free, found.formats, strict=True):
            policy[row] = chosen
        return policy

    def _row_names(self) -> list[str]:
        """For each layer, the first layer that shares its format."""
        names = {i: self._problem.inventory[row[0]].name for row in self._rows for i in row}
        return [names[i] for i in range(len(self._problem.inventory))]

    def _checked(self, start: Solution | Choices) -> np.ndarray:
        problem = self._problem
        formats = np.asarray(start.formats) if isinstance(start, Solution) else self.formats(start)
        policy = self.predicted(formats)
        nbytes = policy.nbytes + problem.account.fixed
        if nbytes > problem.budget or not np.isfinite(policy.error):
            raise BitPolicyError(
                f"a start of {nbytes:,} bytes is not a policy of this problem, which allows {problem.budget:,} bytes"
                " and only formats that each layer may have; repair it first"
            )
        return formats


def policy_key(formats: np.ndarray) -> str:
    """A policy as text with one character per layer, stored with each trial."""
    return "".join(_LETTERS[index] for index in formats)


def formats_of(key: str) -> np.ndarray:
    """The inverse of `policy_key`, int64, shape (layers)."""
    return np.array([_LETTERS.index(letter) for letter in key], dtype=np.int64)


def require_sampler(name: str) -> None:
    """Check that a sampler is known and its dependencies are installed.

    Raises:
        BitPolicyError: it is not.
    """
    if name not in SAMPLERS:
        raise BitPolicyError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise BitPolicyError("sampler cmaes needs a package that is not installed; pip install 'bitpolicy[cmaes]'")


def sampler_named(name: str, seed: int, turn: int) -> BaseSampler:
    """A new sampler. All its knowledge comes from the storage, so a sampler made for each trial resumes anywhere.

    Args:
        name: one of `SAMPLERS`.
        seed: of this trial.
        turn: of this trial.
    """
    require_sampler(name)
    if name == "tpe":
        return TPESampler(seed=seed)
    if name == "gp":
        return GPSampler(seed=seed)
    if name == "cmaes":
        return _CmaEs(seed, turn)
    if name == "nsga2":
        return NSGAIISampler(seed=seed, population_size=_POPULATION)
    return RandomSampler(seed=seed)


class _CmaEs(CmaEsSampler):
    """CMA-ES that draws by turn. Optuna's draws by trial number, and an interrupted trial uses its number up, while its
    turn passes to the next trial. The search begins in the middle of the space, which is the exact solution."""

    def __init__(self, seed: int, turn: int) -> None:
        super().__init__(seed=seed, warn_independent_sampling=False)
        self._turn = turn

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trial = copy.copy(trial)
        trial.number = self._turn
        return super().sample_relative(study, trial, search_space)


def _fixed(parameters: dict[str, float], sampler: BaseSampler) -> BaseSampler:
    """A sampler that suggests only `parameters` and passes everything else on to `sampler`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return PartialFixedSampler(parameters, sampler)
