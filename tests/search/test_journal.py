"""The journal: a worker that slept while it held the lock goes on, and a record that was cut short is put aside."""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileSymlinkLock

from bitpolicy.search.study.journal import SleepersLock, journal


def test_a_lock_that_was_taken_away_is_released_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.touch()
    lock = SleepersLock(str(path))
    assert lock.acquire()
    os.unlink(f"{path}.lock")  # as another process does after the grace period
    lock.release()
    assert lock.acquire()
    lock.release()
    assert not os.path.lexists(f"{path}.lock")
    with pytest.raises(RuntimeError):
        JournalFileSymlinkLock(str(path)).release()  # what it would have been


def test_the_journal_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    study = optuna.create_study(storage=journal(str(path)))
    acquire = SleepersLock.acquire

    def taken_away(self: SleepersLock) -> bool:
        found = acquire(self)
        os.unlink(f"{path}.lock")
        return found

    monkeypatch.setattr(SleepersLock, "acquire", taken_away)
    study.tell(study.ask(), 1.0)
    monkeypatch.undo()
    assert len(optuna.load_study(study_name=study.study_name, storage=journal(str(path))).trials) == 1


@pytest.fixture
def told(tmp_path: Path) -> tuple[Path, bytes]:
    """A journal of three finished trials, and what it holds."""
    path = tmp_path / "journal"
    study = optuna.create_study(study_name="s", storage=journal(str(path)))
    for value in (3.0, 1.0, 2.0):
        study.tell(study.ask(), value)
    return path, path.read_bytes()


def test_a_record_that_was_cut_short_is_put_aside_and_the_study_goes_on(
    told: tuple[Path, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path, content = told
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (last + 1, last + 20, len(content) - 1):
        path.write_bytes(content[:cut])
        study = optuna.load_study(study_name="s", storage=journal(str(path)))
        assert [trial.value for trial in study.trials[:2]] == [3.0, 1.0]
        study.tell(study.ask(), 0.5)
        assert study.best_value == 0.5
        torn = path.with_name("journal.torn")
        assert torn.read_bytes() == content[last:cut]
        torn.unlink()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: ")
        assert "cut short" in line
        assert str(torn) in line


def test_a_whole_journal_is_left_as_it_is(told: tuple[Path, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    path, content = told
    journal(str(path))
    assert path.read_bytes() == content
    assert capsys.readouterr().err == ""
    assert [entry.name for entry in path.parent.iterdir()] == ["journal"]


@pytest.mark.parametrize("tail", [b'{"op_code":4,"trial', b'{"op_code":4,"trial{"op_code":5}\n', b"\0" * 64, b"[1]\n"])
def test_all_from_the_first_record_that_is_none_is_put_aside(told: tuple[Path, bytes], tail: bytes) -> None:
    path, content = told
    path.write_bytes(content + tail + b'{"op_code":4}\n')
    study = optuna.load_study(study_name="s", storage=journal(str(path)))
    assert len(study.trials) == 3
    assert path.read_bytes() == content
    assert path.with_name("journal.torn").read_bytes().startswith(tail)


def test_a_record_is_not_taken_for_torn_while_another_process_writes_it(
    told: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds the lock may be in the middle of a line: opening waits."""
    path, content = told
    path.write_bytes(content[:-5])
    acquire = SleepersLock.acquire

    def finished_meanwhile(self: SleepersLock) -> bool:
        found = acquire(self)
        path.write_bytes(content)
        return found

    monkeypatch.setattr(SleepersLock, "acquire", finished_meanwhile)
    journal(str(path))
    assert path.read_bytes() == content
