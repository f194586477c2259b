"""A worker that slept while it held the journal's lock goes on."""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileSymlinkLock

from bitpolicy.search.journal_lock import SleepersLock
from bitpolicy.search.study import journal


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
