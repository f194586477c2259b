"""Coordination of a study's workers: processes that know each other only through the study's storage.

A worker signs each trial that it begins and takes the lowest free turn. Turns do for a study with many workers what the
count of finished trials does for one: they seed the sampler and assign each start to one trial. Optuna numbers trials
atomically; of the trials that began and have no turn yet, the one with the lowest number goes first.

A killed worker leaves trials that run forever. Others would wait for them, and their turns would be lost. So they are
marked as failed, and their turns freed, once the process is known to be gone or has reported nothing for very long.
"""

from __future__ import annotations

import itertools
import os
import platform
import time
import uuid
from collections.abc import Iterable
from datetime import timedelta
from typing import Final

import psutil  # type: ignore[import-untyped]
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

WORKER: Final = "worker"
TURN: Final = "turn"
_SIGNING = 2.0  # seconds within which a new trial must be signed
_PATIENCE = 60.0  # seconds without a report after which a worker counts as gone, if trials are short
_TRIALS = 3  # the same limit as a multiple of the longest trial
_POLL = 0.1


class Crew:
    """The workers of one study, as seen by one of them."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._worker = _signature(psutil.Process())
        self._signs: dict[int, tuple[int, float]] = {}

    def join(self, trial: Trial) -> int:
        """Sign a trial that begins and return its turn."""
        trial.set_user_attr(WORKER, self._worker)
        self._wait_for_signatures(trial.number)
        self._fail(other for other in self._running() if _is_gone(other))
        # A single read: a trial that takes its turn between two reads would be counted in both.
        states = (TrialState.RUNNING, TrialState.COMPLETE)
        active = self._study.get_trials(deepcopy=False, states=states)
        taken = {other.user_attrs.get(TURN) for other in active}
        ahead = sum(other.number < trial.number and TURN not in other.user_attrs for other in active)
        turn = next(itertools.islice((n for n in itertools.count() if n not in taken), ahead, None))
        trial.set_user_attr(TURN, turn)
        return turn

    def others(self) -> int:
        """The number of trials that other workers are running. Trials of workers that are gone are marked as failed.

        Do not call this during a trial.
        """
        now, patience = time.monotonic(), self._patience()
        signed = [trial for trial in self._running() if WORKER in trial.user_attrs]
        for trial in signed:
            reported = len(trial.intermediate_values)
            if self._signs.get(trial.number, (-1, 0.0))[0] != reported:
                self._signs[trial.number] = (reported, now)
        gone = [t for t in signed if _is_gone(t) or now - self._signs[t.number][1] > patience]
        self._fail(gone)
        return len(signed) - len(gone)

    def _running(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _wait_for_signatures(self, number: int) -> None:
        """Wait until earlier trials are signed. Signing is immediate, so a trial that stays unsigned has failed."""
        end = time.monotonic() + _SIGNING
        while unsigned := [t for t in self._running() if t.number < number and WORKER not in t.user_attrs]:
            if time.monotonic() > end:
                self._fail(unsigned)
            time.sleep(_POLL)

    def _fail(self, trials: Iterable[FrozenTrial]) -> None:
        for trial in trials:
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _patience(self) -> float:
        done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        longest = max((trial.duration or timedelta() for trial in done), default=timedelta())
        return max(_PATIENCE, _TRIALS * longest.total_seconds())


def _signature(process: psutil.Process) -> str:
    return f"{_machine()}:{process.pid}:{process.create_time():.1f}"


def _machine() -> str:
    """An identifier of this machine, or of the container: containers may share everything but their process numbers."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{platform.node()}:{uuid.getnode():x}:{namespace:x}"


def _is_gone(trial: FrozenTrial) -> bool:
    """Whether the worker of a trial ran on this machine and has certainly ended."""
    machine, pid, created = str(trial.user_attrs.get(WORKER, "::")).rsplit(":", 2)
    if machine != _machine():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(created)) > 1.0
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
