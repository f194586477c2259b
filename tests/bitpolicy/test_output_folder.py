"""Which search an output folder belongs to, and what may be removed from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.output_folder import OutputFolder, identity_of
from bitpolicy.settings import Settings

SETTINGS = Settings("5MB", prompts=("cat", "dog"), call=(("num_inference_steps", 2),))
RESULT = {"budget_bytes": 5_000_000}


def claim(path: Path, settings: Settings = SETTINGS, overwrite: bool = False, resume: bool = True) -> OutputFolder:
    return OutputFolder(path, settings, overwrite=overwrite, resume=resume)


def peek(path: Path, settings: Settings = SETTINGS, overwrite: bool = False, resume: bool = True) -> object:
    return OutputFolder.peek(path, settings, overwrite=overwrite, resume=resume)


def test_a_claimed_folder_is_known_by_its_settings(tmp_path: Path) -> None:
    claim(tmp_path / "a" / "b")
    assert json.loads((tmp_path / "a" / "b" / "run.json").read_text()) == identity_of(SETTINGS)
    claim(tmp_path / "a" / "b")


def test_peeking_writes_nothing(tmp_path: Path) -> None:
    assert peek(tmp_path / "out") is None
    assert list(tmp_path.iterdir()) == []


def test_a_finished_search_returns_its_result(tmp_path: Path) -> None:
    folder = claim(tmp_path)
    assert (folder.finished(), peek(tmp_path)) == (None, None)
    folder.finish(RESULT)
    assert folder.finished() == peek(tmp_path) == RESULT
    assert peek(tmp_path, overwrite=True) == RESULT
    assert peek(tmp_path, resume=False) is None


def test_a_search_with_other_settings_is_refused_with_what_differs(tmp_path: Path) -> None:
    claim(tmp_path)
    for look in (claim, peek):
        with pytest.raises(BitPolicyError, match="holds a search with a different budget, seed; choose another"):
            look(tmp_path, replace(SETTINGS, budget="6MB", seed=1))
    assert json.loads((tmp_path / "run.json").read_text()) == identity_of(SETTINGS)


def test_more_trials_continue_a_search(tmp_path: Path) -> None:
    """Probe, study and their files stay. Only the result is removed, because it is for fewer trials."""
    claim(tmp_path).finish(RESULT)
    for name in ("policy.yaml", "study.journal", "trials.csv"):
        (tmp_path / name).write_text("x")
    (tmp_path / "work").mkdir()
    more = replace(SETTINGS, trials=SETTINGS.trials + 1, timeout=60.0)
    assert peek(tmp_path, more) is None
    folder = claim(tmp_path, more)
    assert folder.finished() is None
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json",
        "policy.yaml",
        "study.journal",
        "trials.csv",
        "work",
    }
    assert json.loads((tmp_path / "run.json").read_text()) == identity_of(more)
    folder.finish(RESULT)
    assert peek(tmp_path, more) == RESULT


def test_the_number_of_trials_cannot_be_reduced(tmp_path: Path) -> None:
    claim(tmp_path).finish(RESULT)
    for look in (claim, peek):
        with pytest.raises(BitPolicyError, match=r"holds a search with 24 trials, .*; choose"):
            look(tmp_path, replace(SETTINGS, trials=23))
        with pytest.raises(BitPolicyError, match="holds a search with a different seed; choose"):
            look(tmp_path, replace(SETTINGS, trials=25, seed=1))
    assert peek(tmp_path) == RESULT
    claim(tmp_path, replace(SETTINGS, trials=23), overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json"}


@pytest.mark.parametrize("trials", [None, "many"])
def test_a_folder_that_lost_its_number_of_trials_is_refused(tmp_path: Path, trials: Any) -> None:
    claim(tmp_path)
    held = {**identity_of(SETTINGS), "trials": trials}
    (tmp_path / "run.json").write_text(json.dumps({key: value for key, value in held.items() if value is not None}))
    for look in (claim, peek):
        with pytest.raises(BitPolicyError, match=r"holds a search with a damaged run\.json; choose"):
            look(tmp_path)


def test_without_resuming_more_trials_start_from_scratch(tmp_path: Path) -> None:
    claim(tmp_path)
    (tmp_path / "study.journal").write_text("x")
    claim(tmp_path, replace(SETTINGS, trials=25), resume=False)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json"}


def test_overwriting_another_search_removes_its_results_and_keeps_the_probe(tmp_path: Path) -> None:
    claim(tmp_path).finish(RESULT)
    for name in ("policy.yaml", "sensitivity.csv", "study.journal", "mine.txt"):
        (tmp_path / name).write_text("x")
    for name in ("checkpoint", "work", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    claim(tmp_path, replace(SETTINGS, seed=1), overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "work", "mine.txt", "mine"}
    assert (tmp_path / "work" / "file").exists()
    assert peek(tmp_path, replace(SETTINGS, seed=1)) is None


def test_resuming_removes_nothing(tmp_path: Path) -> None:
    claim(tmp_path)
    for name in ("policy.yaml", "study.journal"):
        (tmp_path / name).write_text("x")
    for overwrite in (False, True):
        claim(tmp_path, overwrite=overwrite)
        assert {path.name for path in tmp_path.iterdir()} == {"run.json", "policy.yaml", "study.journal"}


def test_not_resuming_also_removes_the_probe(tmp_path: Path) -> None:
    claim(tmp_path).finish(RESULT)
    (tmp_path / "work").mkdir()
    (tmp_path / "mine.txt").write_text("x")
    claim(tmp_path, resume=False)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "mine.txt"}


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for look in (claim, peek):
        with pytest.raises(BitPolicyError, match=r"holds something else \(thesis\.tex\)"):
            look(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwriting_removes_only_what_a_search_wrote(tmp_path: Path) -> None:
    """Someone else's training run keeps its checkpoint/ too."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "step-1000.pt").write_text("x")
    claim(tmp_path, overwrite=True)
    assert (tmp_path / "checkpoint" / "step-1000.pt").exists()
