"""The journal: workers stopped or killed while they hold the lock, and truncated or damaged records."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from bitpolicy import BitPolicyError
from bitpolicy.search.study.journal import SleepersLock, journal


def test_releasing_a_lock_that_was_taken_away_is_silent(tmp_path: Path) -> None:
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
        JournalFileSymlinkLock(str(path)).release()  # Optuna's own behaviour


def test_the_journal_uses_this_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def filled_journal(tmp_path: Path) -> tuple[Path, bytes]:
    """A journal of three finished trials, and its content."""
    path = tmp_path / "journal"
    study = optuna.create_study(study_name="s", storage=journal(str(path)))
    for value in (3.0, 1.0, 2.0):
        study.tell(study.ask(), value)
    return path, path.read_bytes()


def test_a_truncated_record_is_moved_aside_and_the_study_continues(
    filled_journal: tuple[Path, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path, content = filled_journal
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


def test_an_intact_journal_is_not_changed(
    filled_journal: tuple[Path, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path, content = filled_journal
    journal(str(path))
    assert path.read_bytes() == content
    assert capsys.readouterr().err == ""
    assert [entry.name for entry in path.parent.iterdir()] == ["journal"]


@pytest.mark.parametrize("tail", [b'{"op_code":4,"trial', b'{"op_code":4,"trial{"op_code":5}\n', b"\0" * 64, b"[1]\n"])
def test_everything_from_the_first_invalid_record_is_moved_aside(
    filled_journal: tuple[Path, bytes], tail: bytes
) -> None:
    path, content = filled_journal
    path.write_bytes(content + tail + b'{"op_code":4}\n')
    study = optuna.load_study(study_name="s", storage=journal(str(path)))
    assert len(study.trials) == 3
    assert path.read_bytes() == content
    assert path.with_name("journal.torn").read_bytes().startswith(tail)


def test_a_record_being_written_is_not_mistaken_for_a_torn_one(
    filled_journal: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that holds the lock may be in the middle of a line, so opening waits."""
    path, content = filled_journal
    path.write_bytes(content[:-5])
    acquire = SleepersLock.acquire

    def finished_meanwhile(self: SleepersLock) -> bool:
        found = acquire(self)
        path.write_bytes(content)
        return found

    monkeypatch.setattr(SleepersLock, "acquire", finished_meanwhile)
    journal(str(path))
    assert path.read_bytes() == content


def test_the_lock_can_be_followed_wherever_its_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna reads the age through the link, and waits forever for a dangling one."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/journal").touch()
    lock = SleepersLock("out/journal")
    lock.acquire()
    Path("out").rename("moved")
    assert os.path.samefile("moved/journal.lock", "moved/journal")


def test_a_dangling_lock_is_removed_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left by a killed process of an older version that was given a relative path."""
    path = tmp_path / "journal"
    path.touch()
    os.symlink("out/journal", f"{path}.lock")
    lock = SleepersLock(str(path))
    lock.grace_period = 0.3  # type: ignore[assignment]
    lock.acquire()
    assert os.path.samefile(f"{path}.lock", path)


def test_a_process_that_is_alone_does_not_wait_for_a_stale_lock(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.touch()
    SleepersLock(str(path)).acquire()
    study = optuna.create_study(storage=journal(str(path), alone=True))
    study.tell(study.ask(), 1.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["journal"]


def records(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)


@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize("damage", ["another value", "gone", "twice", "exchanged"])
def test_altered_records_are_moved_aside(filled_journal: tuple[Path, bytes], at: int, damage: str) -> None:
    """All of these are JSON objects that Optuna would replay."""
    path, content = filled_journal
    lines = records(content)
    if damage == "another value":
        lines[at] = re.sub(rb'"op_code":.', b'"op_code":7', lines[at])
    elif damage == "gone":
        del lines[at]
    elif damage == "twice":
        lines.insert(at, lines[at])
    else:
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
    path.write_bytes(b"".join(lines))
    journal(str(path))
    kept = records(path.read_bytes())
    assert kept == records(content)[: at + (damage == "twice")]
    assert path.with_name("journal.torn").read_bytes() == b"".join(lines[len(kept) :])


def test_a_journal_of_an_older_version_can_be_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal"
    older = optuna.create_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(path))))
    older.tell(older.ask(), 3.0)
    unmarked = records(path.read_bytes())
    study = optuna.load_study(study_name="s", storage=journal(str(path)))
    study.tell(study.ask(), 1.0)
    assert [t.value for t in optuna.load_study(study_name="s", storage=journal(str(path))).trials] == [3.0, 1.0]
    assert capsys.readouterr().err == ""
    lines = records(path.read_bytes())
    assert [b'"mark"' in line for line in lines] == [False] * len(unmarked) + [True] * (len(lines) - len(unmarked))


def test_a_full_disk_leaves_no_half_record(filled_journal: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = filled_journal
    study = optuna.load_study(study_name="s", storage=journal(str(path)))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        study.ask()
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert not os.path.lexists(f"{path}.lock")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["a folder", "a pipe"])
def test_a_path_that_is_not_a_file_is_refused(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "journal")
    with pytest.raises(BitPolicyError, match=r"study's journal .*journal is not a file; move it away"):
        journal(str(tmp_path / "journal"))
