"""Several processes work on one study, and one is killed: every trial is done, and none is done twice."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from bitpolicy.search.problem import Problem
from bitpolicy.search.study import storage as storage_module
from bitpolicy.search.study.journal import journal
from bitpolicy.search.study.samplers import policy_key
from bitpolicy.search.study.study import Study, open_storage
from bitpolicy.sensitivity.samples import Sample

Samples = list[Sample]
NewGenerations = Callable[..., Any]
Workers = Callable[..., list[subprocess.Popen[str]]]
TIMEOUT = 120


def trials(url: str, *states: TrialState) -> list[FrozenTrial]:
    return optuna.load_study(study_name="s", storage=open_storage(url)).get_trials(states=states or None)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def ended(worker: subprocess.Popen[str]) -> list[str]:
    """What a worker printed: its best policy, and the number of trials it saw."""
    out, err = worker.communicate(timeout=TIMEOUT)
    assert worker.returncode == 0, err[-3000:]
    return out.split()


def begun(url: str, samples: int = 1) -> bool:
    """Whether some running trial has reported this many samples."""
    try:
        running = trials(url, TrialState.RUNNING)
    except KeyError:
        return False  # no study yet
    return any(len(trial.intermediate_values) >= samples for trial in running)


def test_two_processes_share_a_journal(new_workers: Workers, problem: Problem, tmp_path: Path) -> None:
    url = f"journal:///{tmp_path}/journal"
    outputs = [ended(worker) for worker in new_workers(url, count=2, trials=12)]
    finished = trials(url, TrialState.COMPLETE)
    assert len(trials(url)) == len(finished)
    assert 12 <= len(finished) <= 13  # both may start the last one
    by_worker = Counter(trial.user_attrs["worker"] for trial in finished)
    assert len(by_worker) == 2
    assert min(by_worker.values()) > 2
    assert outputs[0] == outputs[1]
    assert int(outputs[0][1]) == len(finished)
    assert sorted(trial.user_attrs["turn"] for trial in finished) == list(range(len(finished)))
    exact = [trial for trial in finished if trial.user_attrs["policy"] == policy_key(problem.solve().formats)]
    assert [trial.user_attrs["turn"] for trial in exact if not any(trial.params.values())] == [0]
    assert len({tuple(trial.params.values()) for trial in finished}) == len(finished)


def test_a_killed_process_is_not_waited_for_and_its_trial_is_repeated(
    new_workers: Workers, problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    """The next worker suggests what the study would have seen without the kill, and every turn is used."""
    whole = Study(problem, new_generations(), samples, f"journal:///{tmp_path}/whole", "s", 0)
    whole.run(5)
    url = f"journal:///{tmp_path}/killed"
    (victim,) = new_workers(url, trials=5)
    wait_for(lambda: begun(url))
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert len(trials(url, TrialState.RUNNING)) == 1
    resumed = Study(problem, new_generations(), samples, url, "s", 0)
    resumed.run(5)
    assert trials(url, TrialState.RUNNING) == []
    assert len(trials(url, TrialState.FAIL)) == 1
    assert [(t.params, t.value) for t in resumed.finished] == [(t.params, t.value) for t in whole.finished]


def test_a_worker_takes_over_the_turn_of_a_killed_one(
    new_workers: Workers, problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path
) -> None:
    url = f"journal:///{tmp_path}/journal"
    (victim,) = new_workers(url, trials=6)
    wait_for(lambda: begun(url))
    killed = [trial.user_attrs["turn"] for trial in trials(url, TrialState.RUNNING)]
    study = Study(problem, new_generations(), samples, url, "s", 0)
    seen = len(study.finished)

    def kill() -> None:
        victim.send_signal(signal.SIGKILL)
        victim.wait()

    study.run(seen + 1, after_each=kill)
    study.run(6)
    assert trials(url, TrialState.RUNNING) == []
    assert sorted(trial.user_attrs["turn"] for trial in study.finished) == list(range(6))
    assert killed[0] in [trial.user_attrs["turn"] for trial in study.finished]


def test_a_stopped_process_thought_dead_loses_its_trial_and_continues(
    new_workers: Workers,
    problem: Problem,
    new_generations: NewGenerations,
    samples: Samples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage_module, "_PATIENCE", 0.5)
    url = f"journal:///{tmp_path}/journal"
    (sleeper,) = new_workers(url, trials=4)
    wait_for(lambda: begun(url))
    os.kill(sleeper.pid, signal.SIGSTOP)
    try:
        study = Study(problem, new_generations(), samples, url, "s", 0)
        study.run(4)
        assert len(study.finished) == 4
        assert len(trials(url, TrialState.FAIL)) == 1
    finally:
        os.kill(sleeper.pid, signal.SIGCONT)
    assert ended(sleeper)[1] == "4"


@pytest.mark.parametrize("wanted", [1, 2])
def test_the_last_trial_of_another_worker_is_waited_for(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path, wanted: int
) -> None:
    """Every worker ends with the same best policy, and no further trial starts in the meantime."""
    slow, path = new_generations(), str(tmp_path / "journal")
    Study(problem, new_generations(), samples, journal(path), "s", 0).run(1)
    release = threading.Event()
    errors = slow.errors

    def held(*args: Any) -> Any:
        assert release.wait(TIMEOUT)
        return errors(*args)

    slow.errors = held
    other = Study(problem, slow, samples, journal(path), "s", 0)
    thread = threading.Thread(target=other.run, args=(2,))
    thread.start()
    wait_for(lambda: any("turn" in t.user_attrs for t in trials(f"journal:///{path}", TrialState.RUNNING)))
    threading.Timer(0.5, release.set).start()
    study = Study(problem, new_generations(), samples, journal(path), "s", 0)
    ticks: list[int] = []
    study.run(wanted, after_each=lambda: ticks.append(1))
    assert [trial.user_attrs["turn"] for trial in study.finished] == [0, 1]
    assert len(trials(f"journal:///{path}")) == 2
    assert len(ticks) == 1
    thread.join()


def test_trials_that_start_together_take_different_turns(tmp_path: Path) -> None:
    """The one with the lower number has signed, but not yet taken its turn, which will be the lowest free one."""
    path = str(tmp_path / "journal")
    study = optuna.create_study(study_name="s", storage=journal(path))
    crew = storage_module.Crew(study)
    first, second, third = study.ask(), study.ask(), study.ask()
    for trial in (first, second):
        trial.set_user_attr("worker", crew._worker)
    assert crew.join(third) == 2
    assert crew.join(first) == 0
    assert crew.join(second) == 1
    study.tell(second, state=TrialState.FAIL)
    assert crew.join(study.ask()) == 1


@pytest.mark.parametrize("moment", range(1, 6))
def test_a_trial_that_takes_its_turn_during_a_read_is_counted_once(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study(study_name="s", storage=journal(str(tmp_path / "journal")))
    crew = storage_module.Crew(study)
    first, second = study.ask(), study.ask()
    first.set_user_attr("worker", crew._worker)
    look, looks = study.get_trials, itertools.count(1)

    def then_the_first_takes_its_turn(**options: Any) -> list[FrozenTrial]:
        seen = [copy.deepcopy(trial) for trial in look(**options)]
        if next(looks) == moment:
            first.set_user_attr("turn", 0)
        return seen

    monkeypatch.setattr(study, "get_trials", then_the_first_takes_its_turn)
    assert crew.join(second) == 1


@pytest.mark.parametrize("here", [True, False])
def test_a_turn_is_freed_at_once_for_a_dead_process_and_later_for_an_unknown_one(
    problem: Problem,
    new_generations: NewGenerations,
    samples: Samples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: bool,
) -> None:
    monkeypatch.setattr(storage_module, "_PATIENCE", 0.5)
    path = str(tmp_path / "journal")
    study = Study(problem, new_generations(), samples, journal(path), "s", 0)
    left = optuna.load_study(study_name="s", storage=journal(path)).ask()
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    left.set_user_attr("worker", f"{storage_module._machine() if here else 'elsewhere:1:1'}:{gone.pid}:1.0")
    left.set_user_attr("turn", 0)
    study.run(2)
    assert [trial.user_attrs["turn"] for trial in study.finished] == ([0, 1] if here else [1, 0])
    assert len(trials(f"journal:///{path}", TrialState.FAIL)) == 1


def test_a_run_starts_no_trial_after_its_timeout(
    problem: Problem, new_generations: NewGenerations, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "journal")
    clock = iter(range(0, 100000, 10))
    study = Study(problem, new_generations(), samples, journal(path), "s", 0, timeout=0)
    study.run(3)
    assert study.finished == []
    assert study.best(1) == [problem.choices(problem.solve())]
    study = Study(problem, new_generations(), samples, journal(path), "s", 0, timeout=25)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    study.run(1000)
    assert 1 <= len(study.finished) < 25
