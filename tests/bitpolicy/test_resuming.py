"""A search that is stopped by Ctrl-C or killed continues with the same command, and ends as if it had never stopped."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitpolicy.output_folder import OutputFolder
from bitpolicy.policies.checkpoints import pipeline as export
from bitpolicy.search.generation import Generations
from bitpolicy.search.study import storage
from bitpolicy.sensitivity.records import Records
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.workflow import decision
from bitpolicy.workflow import search_run as workflow

PIECES = 4 + 16 * 2 + 2  # the reference, four samples a call; two sketches a sample; summed layers, weight errors


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("seconds", "output_dir")}


def arguments_for(finished: Any, folder: Path) -> tuple[str, ...]:
    return (*finished.arguments, "--output-dir", str(folder))


def assert_same_end(outcome: Any, finished: Any, folder: Path) -> None:
    """The files of the search that was never stopped, byte for byte where they hold no time of day."""
    assert outcome.code == 0
    assert without_seconds(outcome.result) == without_seconds(finished.outcome.result)
    for name in ("policy.yaml", "calibration.safetensors", "sensitivity.safetensors", "sensitivity.csv", "compare.png"):
        assert (folder / name).read_bytes() == (finished.folder / name).read_bytes(), name
    weights = "checkpoint/unet/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (finished.folder / weights).read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in finished.folder.iterdir()}


def stopping(original: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """The same function with Ctrl-C after `calls` calls."""
    count = itertools.count()

    def until(*args: Any, **kwargs: Any) -> Any:
        if next(count) >= calls:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    return until


@pytest.fixture
def interrupted(command: Any, finished: Any, here: Path) -> Callable[..., Any]:
    """`interrupted(owner, name, calls)`: the same search as `finished`, stopped after `calls` calls of a function."""

    def run(owner: Any, name: str, calls: int = 0) -> Any:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(owner, name, stopping(getattr(owner, name), calls))
            outcome = command(*arguments_for(finished, here / "out"))
        assert (outcome.code, outcome.out) == (130, "")
        assert not (here / "out" / "result.json").exists()
        partial = [path.name for path in (here / "out").rglob("*") if path.name.endswith(("-partial", "-old", "-lock"))]
        assert partial == []
        return outcome

    return run


def test_a_stop_says_how_to_continue(interrupted: Any) -> None:
    outcome = interrupted(Records, "put")
    assert outcome.err.strip() == "search-policy: stopped; run the same command again to continue"


@pytest.mark.parametrize("done", [1, 12])
def test_the_probe_computes_only_the_missing_pieces(
    command: Any, finished: Any, here: Path, interrupted: Any, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    interrupted(Records, "put", done)
    assert len(list((here / "out" / "work").glob("*/*.safetensors"))) == done
    made: list[str] = []
    put = Records.put

    def counted(records: Records, name: str, tensors: Any) -> None:
        made.append(name)
        put(records, name, tensors)

    monkeypatch.setattr(Records, "put", counted)
    outcome = command(*arguments_for(finished, here / "out"))
    assert len(made) == len(set(made)) == PIECES - done
    assert_same_end(outcome, finished, here / "out")


@pytest.mark.parametrize("calls", [0, 1])
def test_the_study_continues_after_the_finished_trials(
    command: Any, finished: Any, here: Path, interrupted: Any, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """The probe and the earlier trials are not repeated."""
    interrupted(Generations, "scores", calls)
    probed, tried = [], []
    scores = Generations.scores

    def no_probe(this: Trajectories, *args: Any) -> Any:
        probed.append(args)

    def counted(this: Generations, choices: Any, samples: Any) -> Any:
        tried.append(len(samples))
        return scores(this, choices, samples)

    monkeypatch.setattr(Trajectories, "differentiable_signal", no_probe)
    monkeypatch.setattr(Generations, "scores", counted)
    outcome = command(*arguments_for(finished, here / "out"))
    assert probed == []
    finalists = len(_finalists(here / "out"))
    assert len(tried) == 2 - calls + finalists
    assert_same_end(outcome, finished, here / "out")


def test_more_trials_end_as_if_they_had_been_requested_at_once(
    command: Any, finished: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.folder, here / "out")
    _probed_already(finished, here / "fresh")
    (here / "fresh" / "run.json").unlink()
    tried, scores = [], Generations.scores

    def counted(this: Generations, choices: Any, samples: Any) -> Any:
        tried.append(len(samples))
        return scores(this, choices, samples)

    monkeypatch.setattr(Generations, "scores", counted)
    outcome = command(*arguments_for(finished, here / "out"), "--trials", "3")
    assert outcome.code == 0
    assert len(tried) <= 1 + len(_finalists(here / "out"))  # a third trial that repeats a policy draws nothing
    whole = command(*arguments_for(finished, here / "fresh"), "--trials", "3", "--overwrite")
    assert without_seconds(outcome.result) == without_seconds(whole.result)
    assert _csv(here / "out" / "trials.csv") == _csv(here / "fresh" / "trials.csv")
    assert len(_csv(here / "out" / "trials.csv")) == 3
    assert (here / "out" / "policy.yaml").read_bytes() == (here / "fresh" / "policy.yaml").read_bytes()


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _finalists(folder: Path) -> list[float]:
    return yaml.safe_load((folder / "policy.yaml").read_text())["provenance"]["search"]["finalists"]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (decision, "confirm"),
        (export, "export_component"),
        (workflow, "save_comparison"),
        (OutputFolder, "finish"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_later_stage_resumes(
    command: Any, finished: Any, here: Path, interrupted: Any, owner: Any, name: str
) -> None:
    _probed_already(finished, here / "out")
    interrupted(owner, name)
    assert (here / "out" / "checkpoint").exists() == (name in ("save_comparison", "finish"))
    assert_same_end(command(*arguments_for(finished, here / "out")), finished, here / "out")


def _probed_already(finished: Any, folder: Path) -> None:
    """What an interrupted search leaves after its probe, copied to save time."""
    folder.mkdir()
    shutil.copy(finished.folder / "run.json", folder)
    shutil.copytree(finished.folder / "work", folder / "work")


KILLER = """
import os, signal
from bitpolicy.{module} import {owner}
original, calls = {owner}.{name}, 0
def until(*args, **kwargs):
    global calls
    calls += 1
    if calls > {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
{owner}.{name} = until
"""


@pytest.mark.parametrize(
    ("module", "owner", "name", "calls"),
    [("sensitivity.records", "Records", "put", 7), ("search.generation", "Generations", "scores", 1)],
    ids=["in the probe", "in the study"],
)
def test_a_killed_search_resumes(
    command: Any, process: Any, finished: Any, here: Path, module: str, owner: str, name: str, calls: int
) -> None:
    first = KILLER.format(module=module, owner=owner, name=name, calls=calls)
    if name == "scores":
        _probed_already(finished, here / "out")
    killed = process(*arguments_for(finished, here / "out"), first=first)
    assert killed.code == -9
    assert killed.out == ""
    assert not (here / "out" / "result.json").exists()
    assert_same_end(command(*arguments_for(finished, here / "out")), finished, here / "out")


def test_a_damaged_piece_is_computed_again(command: Any, finished: Any, here: Path) -> None:
    _probed_already(finished, here / "out")
    for piece in itertools.islice(sorted((here / "out" / "work").rglob("sketch-3-*.safetensors")), 2):
        piece.write_bytes(piece.read_bytes()[:40])
    assert_same_end(command(*arguments_for(finished, here / "out")), finished, here / "out")


def test_a_search_whose_journal_was_cut_short_resumes(
    command: Any, finished: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a full disk or a power cut, inside the last line. The trial whose end it held is signed by this very process,
    which is alive, so it would be waited for."""
    monkeypatch.setattr(storage, "_PATIENCE", 0.5)
    folder = here / "out"
    shutil.copytree(finished.folder, folder)
    for name in ("result.json", "policy.yaml"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint")
    study = folder / "study.journal"
    study.write_bytes(study.read_bytes()[:-10])
    outcome = command(*arguments_for(finished, folder))
    assert outcome.code == 0
    assert "cut short" in outcome.err
    assert without_seconds(outcome.result)["policy_bytes"] == finished.outcome.result["policy_bytes"]
    assert (folder / "study.journal.torn").is_file()


@pytest.mark.parametrize("damage", ["another number", "empty", "a folder", "of an older version"])
def test_a_damaged_result_is_written_again(command: Any, finished: Any, here: Path, damage: str) -> None:
    folder = here / "out"
    shutil.copytree(finished.folder, folder)
    path = folder / "result.json"
    text = path.read_text()
    if damage == "another number":
        path.write_text(text.replace('"policy_bytes": ', '"policy_bytes": 1'))
    elif damage == "empty":
        path.write_text("")
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text(json.dumps({key: value for key, value in json.loads(text).items() if key != "sha256"}))
    outcome = command(*arguments_for(finished, folder))
    assert_same_end(outcome, finished, folder)
    (warning,) = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert f"cannot read {path}" in warning
    again = command(*arguments_for(finished, folder))
    assert again.out == outcome.out
    assert "warning" not in again.err
