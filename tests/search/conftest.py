"""A problem of 36 layers without any model, and generations whose errors are a formula."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.policy import Choice
from bitpolicy.search.generation import Score
from bitpolicy.search.problem import Problem
from bitpolicy.search.quality.objective import MSE, Objective
from bitpolicy.search.study.study import open_storage
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.table import SensitivityTable

ROLES = ("conv", "attention_qkv", "feed_forward", "output_head")
STAGES = ("encoder", "middle", "decoder")
FORMATS = (format_named("int4"), format_named("int8"), FP16)


@dataclass
class ScriptedGenerations:
    """Replaces `Generations`: an image's error is the sum of its layers' true errors times a factor per sample.

    Attributes:
        true_error: float64, shape (layers, formats without FP16).
        asked: each scored policy, with the samples whose error was taken.
        stop_after: raise KeyboardInterrupt once this many errors were given.
    """

    true_error: torch.Tensor
    asked: list[tuple[dict[str, Choice], list[Sample]]] = field(default_factory=list)
    stop_after: float = float("inf")
    objective: Objective = MSE

    def scores(self, choices: Mapping[str, Choice], samples: Sequence[Sample]) -> Generator[Score, None, None]:
        return (Score(error, error) for error in self.errors(choices, samples))

    def errors(self, choices: Mapping[str, Choice], samples: Sequence[Sample]) -> Generator[float, None, None]:
        taken: list[Sample] = []
        self.asked.append((dict(choices), taken))
        total = self.total(choices)
        for sample in samples:
            if sum(len(seen) for _, seen in self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            taken.append(sample)
            yield total * factor(sample)

    def total(self, choices: Mapping[str, Choice]) -> float:
        places = enumerate(choice.format for choice in choices.values())
        return sum(float(self.true_error[i, FORMATS.index(f)]) for i, f in places if f.packed) + 1e-6


def factor(sample: Sample) -> float:
    """A factor between 1 and 1.5, different for each sample."""
    return 1 + 0.5 * (sample.seed * 0.6180339887 % 1)


def new_problem() -> Problem:
    """A third of FP16; three layers of each role and stage, sizes over an order of magnitude."""
    draw = torch.Generator().manual_seed(0)
    layers = [
        Layer(f"{stage}.{i}.{role}", "Linear", (32 * (i + 1) * (j + 1), 64), True, role, stage)
        for j, (role, stage) in enumerate(itertools.product(ROLES, STAGES))
        for i in range(3)
    ]
    error = torch.rand(len(layers), 2, generator=draw, dtype=torch.float64) + 0.1
    error[:, 1] /= 30
    names = tuple(layer.name for layer in layers)
    table = SensitivityTable("ablation", names, FORMATS[:2], error, torch.ones_like(error, dtype=torch.bool))
    account = ByteAccount(
        torch.float16, {layer.name: layer.shape for layer in layers}, fixed=1000, parameters=1_000_000
    )
    return Problem(layers, FORMATS, account, table=table, budget=account.reference // 3)


def scripted_generations(problem: Problem, **settings: Any) -> ScriptedGenerations:
    """Generations whose true errors differ from the table by a factor per group."""
    draw = torch.Generator().manual_seed(1)
    wrong = dict(zip(problem.groups, torch.rand(len(problem.groups), generator=draw).tolist(), strict=True))
    factors = torch.tensor([16 ** (2 * wrong[layer.group] - 1) for layer in problem.inventory], dtype=torch.float64)
    return ScriptedGenerations(problem.table.error * factors[:, None], **settings)


@pytest.fixture
def problem() -> Problem:
    return new_problem()


@pytest.fixture
def new_generations(problem: Problem) -> Callable[..., ScriptedGenerations]:
    return partial(scripted_generations, problem)


@pytest.fixture
def samples() -> list[Sample]:
    return [Sample("cat", seed) for seed in range(8)]


# A process that works on study "s": conftest.py, storage, trials, seconds per sample, whether it runs all trials. If
# not, the table is right, and the study can stop early. It prints the best policy and the number of finished trials.
WORKER = """
import importlib.util, sys, time
from bitpolicy.search.study.study import Study
from bitpolicy.sensitivity.samples import Sample

path, storage, trials, seconds, every = sys.argv[1:]
spec = importlib.util.spec_from_file_location("scripted", path)
scripted = sys.modules["scripted"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)
problem = scripted.new_problem()
generations = scripted.scripted_generations(problem)
if every != "True":
    generations.true_error = problem.table.error
errors = generations.errors

def slow(*args):
    for error in errors(*args):
        time.sleep(float(seconds))
        yield error

generations.errors = slow
print("ready", flush=True)
sys.stdin.readline()
study = Study(problem, generations, [Sample("cat", seed) for seed in range(8)], storage, "s", 0)
study.run(int(trials), every_trial=every == "True")
print("-".join(choice.format.name for choice in study.best(1)[0].values()), len(study.finished))
"""


@pytest.fixture
def new_workers() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """`new_workers(url, count, trials)`: processes that run trials of study "s" in one storage. They start together,
    once each has finished its imports, however long that takes."""
    started: list[subprocess.Popen[str]] = []

    def new(
        url: str, count: int = 1, trials: int = 1, seconds: float = 0.05, every_trial: bool = True
    ) -> list[subprocess.Popen[str]]:
        line = [sys.executable, "-c", WORKER, __file__, url, str(trials), str(seconds), str(every_trial)]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        workers = [subprocess.Popen(line, text=True, **pipes) for _ in range(count)]
        started.extend(workers)
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n", worker.communicate()[1][-3000:]
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        return workers

    yield new
    for worker in started:
        worker.kill()
        worker.communicate()


@pytest.fixture
def share(new_workers: Callable[..., list[subprocess.Popen[str]]]) -> Callable[[str], None]:
    """`share(url)`: two processes work on one study in an empty storage; every trial is done exactly once."""

    def run(url: str) -> None:
        outputs = []
        for worker in new_workers(url, count=2, trials=12):
            out, err = worker.communicate(timeout=200)
            assert worker.returncode == 0, err[-3000:]
            outputs.append(out.split())
        study = optuna.load_study(study_name="s", storage=open_storage(url))
        finished = study.get_trials(states=(TrialState.COMPLETE,))
        assert len(study.trials) == len(finished)
        assert 12 <= len(finished) <= 13  # both may start the last one
        assert len(Counter(trial.user_attrs["worker"] for trial in finished)) == 2
        assert sorted(trial.user_attrs["turn"] for trial in finished) == list(range(len(finished)))
        assert outputs[0] == outputs[1]
        assert outputs[0][1] == str(len(finished))

    return run


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """`free_port()`: an unused port of this machine."""

    def find() -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return int(free.getsockname()[1])

    return find
