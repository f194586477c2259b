"""The Optuna study: adjust the exact solution to what generated images show.

A trial suggests how to scale the errors of each group of layers, and the knapsack turns that into a policy, so every
trial fits the budget (`bitpolicy.search.study.samplers`). A trial's score is its mean image error over the search
samples, as the objective measures it, reported sample by sample. `WilcoxonPruner`, made for paired scores, stops losing
trials early. The first trials are the exact solution and any other policies to start from, so on the samples that the
study saw, the result is never worse than any of them. The study stops when more trials are not worth their time
(`bitpolicy.search.study.stopping`). Any number of processes can run trials of one study
(`bitpolicy.search.study.storage`).
"""

from __future__ import annotations

import importlib.util
import math
import random
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import WilcoxonPruner
from optuna.storages import BaseStorage, GrpcStorageProxy
from optuna.trial import FrozenTrial, Trial, TrialState

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.search.generation import Generations, Score
from bitpolicy.search.knapsack import Solution
from bitpolicy.search.problem import Problem
from bitpolicy.search.study.journal import journal
from bitpolicy.search.study.samplers import Choices, Space, formats_of, policy_key, require_sampler
from bitpolicy.search.study.stopping import Verdict, in_turn, verdict
from bitpolicy.search.study.storage import Crew
from bitpolicy.search.study.trials import TrialRow
from bitpolicy.sensitivity.samples import Sample

_POLL = 0.2  # seconds between checks on other workers, when there is nothing else to do
_ATTEMPTS = 20  # to open a database in which other workers are creating tables
_GRPC, _JOURNAL = "grpc://", "journal:///"


class Study:
    """One resumable study of one problem.

    Args:
        problem: the search problem.
        generations: generates and scores the images of a trial.
        samples: the search samples.
        storage: an Optuna storage, or its URL.
        name: of the study in its storage; an existing study of that name is continued.
        seed: of the sampler. With one worker, equal seeds give equal trials.
        sampler: one of `bitpolicy.search.study.samplers.SAMPLERS`.
        space: "group", one multiplier per role and stage, or "layer", one per layer.
        timeout: seconds after which `run` starts no further trial.
        starts: policies to try first and to vary, in addition to the exact solution.

    Raises:
        BitPolicyError: an invalid sampler, space or start, or an existing study of that name in another space.
    """

    def __init__(
        self,
        problem: Problem,
        generations: Generations,
        samples: Sequence[Sample],
        storage: str | BaseStorage,
        name: str,
        seed: int,
        sampler: str = "tpe",
        space: str = "group",
        timeout: float | None = None,
        starts: Sequence[Solution | Choices] = (),
    ) -> None:
        require_sampler(sampler)
        self._problem, self._generations, self._samples = problem, generations, list(samples)
        self._space, self._sampler, self._seed, self._timeout = Space(problem, space, starts), sampler, seed, timeout
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._study = optuna.create_study(
                storage=open_storage(storage) if isinstance(storage, str) else storage,
                study_name=name,
                load_if_exists=True,
                direction="minimize",
                pruner=WilcoxonPruner(p_threshold=0.1, n_startup_steps=4),
            )
            self._study.set_metric_names([generations.objective.title])
        self._crew, self._judged = Crew(self._study), 0
        self._describe_study(name, space)

    def run(
        self, trials: int, after_each: Callable[[], None] = lambda: None, every_trial: bool = True
    ) -> Verdict | None:
        """Run until `trials` trials are finished in total, including those of earlier runs and other workers.

        Waits for the last trials of other workers, so that every worker ends with the same study.

        Args:
            trials: how many.
            after_each: called once for each trial that finishes during the call, in any worker.
            every_trial: whether to run all of them, even if it is unlikely that they improve anything.

        Returns:
            Why the study stopped before the last trial; None if it did not, or if it ran out of time.
        """
        end = math.inf if self._timeout is None else time.monotonic() + self._timeout
        counted, self._judged, found = len(self.finished), 0, None
        while time.monotonic() < end:
            others, done = self._crew.others(), len(self.finished)
            found = found or (None if every_trial else self._verdict(trials))
            if (found or done >= trials) and not others:
                break
            if not found and done + others < trials:
                self._run_one()
            else:
                time.sleep(_POLL)
            for _ in range(counted, len(self.finished)):
                counted += 1
                after_each()
        return found or (None if every_trial else self._verdict(trials))

    def _verdict(self, asked: int) -> Verdict | None:
        """The first verdict among the trials of the first turns. Those judged before are not judged again."""
        trials = in_turn(self.finished)
        for count in range(self._judged + 1, len(trials) + 1):
            found = verdict(trials[:count], len(self._space.starts), len(self._samples), asked)
            if found is not None:
                return found
        self._judged = len(trials)
        return None

    @property
    def finished(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    @property
    def rows(self) -> list[TrialRow]:
        """Every finished trial, in the order in which they began."""
        starts = [policy_key(start) for start in self._space.starts]
        found = []
        for trial in self.finished:
            about, value = trial.user_attrs, trial.value
            assert value is not None  # the trial is finished
            place = starts.index(about["policy"]) if about["policy"] in starts and "repeats" not in about else None
            start = "" if place is None else _start_name(place)
            stopped = about["samples"] < len(self._samples)
            found.append(
                TrialRow(trial.number, start, value, about["psnr_db"], about["samples"], stopped, about.get("repeats"))
            )
        return found

    def best(self, count: int) -> list[Choices]:
        """The `count` best distinct policies that were scored on every sample, best first.

        The exact solution comes last if it is not among them.
        """
        keys = list(dict.fromkeys(trial.user_attrs["policy"] for trial in self._ranked()))[:count]
        exact = policy_key(self._space.starts[0])
        return [self._space.choices(formats_of(key)) for key in (keys if exact in keys else [*keys, exact])]

    def origin(self, choices: Choices) -> str:
        """Where a policy of this study comes from, as readable text: its first trial, or the start it equals."""
        key = policy_key(self._space.formats(choices))
        starts = [policy_key(start) for start in self._space.starts]
        if key in starts:
            return _start_name(starts.index(key))
        return f"trial {min(trial.number for trial in self._ranked() if trial.user_attrs['policy'] == key)}"

    def origin_of(self, number: int) -> str:
        """The same for the policy of a finished trial."""
        key = next(trial.user_attrs["policy"] for trial in self.finished if trial.number == number)
        return self.origin(self._space.choices(formats_of(key)))

    def _ranked(self) -> list[FrozenTrial]:
        """Finished trials that were scored on every sample, best first."""
        whole = [trial for trial in self.finished if trial.user_attrs.get("samples") == len(self._samples)]
        return sorted(whole, key=lambda trial: (trial.value, trial.number))

    def _run_one(self) -> None:
        trial = self._study.ask()
        try:
            value = self._score(trial)
        except UpdateFinishedTrialError:
            return  # another worker took this slow worker for dead, and does the trial itself
        except BaseException:
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        self._study.tell(trial, value, skip_if_finished=True)

    def _score(self, trial: Trial) -> float:
        turn = self._crew.join(trial)
        self._study.sampler = self._space.sampler(self._sampler, self._seed, turn)
        formats = self._space.suggest(trial)
        for name, value in self._space.described(formats).items():
            trial.set_user_attr(name, value)
        key = policy_key(formats)
        twin = next((done for done in self.finished if done.user_attrs.get("policy") == key), None)
        return self._measured(trial, formats, turn) if twin is None else self._repeated(trial, twin)

    def _measured(self, trial: Trial, formats: np.ndarray, turn: int) -> float:
        order = list(range(len(self._samples)))
        random.Random(turn).shuffle(order)
        scores: list[Score] = []
        wanted = [self._samples[index] for index in order]
        # Closed explicitly: a stopped trial must not leave its weights in the model.
        with closing(self._generations.scores(self._space.choices(formats), wanted)) as found:
            for index, score in zip(order, found, strict=True):
                if not np.isfinite(score.distance):
                    raise BitPolicyError(
                        "a policy's images have NaN or Inf; keep layers that overflow at fp16 with --keep 'GLOB=fp16'"
                    )
                scores.append(score)
                trial.report(score.distance, index)
                trial.set_user_attr("psnr_db", _psnr([score.mse for score in scores]))
                if trial.should_prune():
                    break
        trial.set_user_attr("samples", len(scores))
        return float(
            np.mean([score.distance for score in scores])
        )  # also for a stopped trial: an estimate that the sampler can learn from

    def _repeated(self, trial: Trial, twin: FrozenTrial) -> float:
        """The result of a finished trial of the same policy. Generations are deterministic, so none is repeated.

        The pruner is not asked either: it takes seconds when all differences are zero.
        """
        for index, error in twin.intermediate_values.items():
            trial.report(error, index)
        for key in ("psnr_db", "samples"):
            trial.set_user_attr(key, twin.user_attrs[key])
        trial.set_user_attr("repeats", twin.number)
        assert twin.value is not None
        return twin.value

    def _describe_study(self, name: str, space: str) -> None:
        held = self._study.user_attrs.get("space", space)
        if held != space:
            raise BitPolicyError(
                f"study {name!r} in this storage has space {held!r}, not {space!r}; continue with --space {held}, or "
                "give another --storage"
            )
        described: dict[str, Any] = {
            "space": space,
            "budget_bytes": self._problem.budget,
            "layers": len(self._problem.inventory),
            "formats": [format.name for format in self._problem.formats],
            "samples": len(self._samples),
            "objective": self._generations.objective.name,
            "starts": [policy_key(formats) for formats in self._space.starts],
        }
        for key, value in described.items():
            self._study.set_user_attr(key, value)


def _start_name(place: int) -> str:
    return f"start {place}" if place else "the exact solution"


def _psnr(errors: Sequence[float]) -> float | None:
    """Mean dB over the scored images that differ from the reference."""
    differing = [-10 * math.log10(error) for error in errors if error > 0]
    return float(np.mean(differing)) if differing else None


def open_storage(url: str, attempts: int = _ATTEMPTS) -> BaseStorage:
    """Open the storage at a URL: any that Optuna knows, or grpc://HOST:PORT or journal:///FILE.

    Raises:
        BitPolicyError: Optuna cannot open it.
    """
    try:
        return _opened(url)
    except Exception as error:
        if attempts > 1 and "already exists" in str(error):
            time.sleep(_POLL)  # workers that start together create the same tables in an empty database
            return open_storage(url, attempts - 1)
        raise BitPolicyError(
            f"Optuna cannot open storage {url!r}: {' '.join(str(error).split())}; "
            "give a URL it knows, e.g. sqlite:///study.db"
        ) from error


def _opened(url: str) -> BaseStorage:
    if url.startswith(_JOURNAL):
        return journal(url.removeprefix(_JOURNAL))
    if url.startswith(_GRPC):
        if importlib.util.find_spec("grpc") is None:
            raise ModuleNotFoundError("it needs pip install 'bitpolicy[grpc]'")
        host, _, port = url.removeprefix(_GRPC).partition(":")
        proxy = GrpcStorageProxy(host=host, port=int(port or 13000))
        proxy.wait_server_ready(timeout=10)
        return proxy
    return optuna.storages.get_storage(url)
