"""The study's journal: a file that records are appended to, which survives a kill, a full disk and a power cut.

Optuna locks the file while it appends. Two things may go wrong that it does not foresee. A process that was stopped
while it held the lock finds it taken away when it wakes up. And a record that was cut short, because the disk was full
or the power went, would make every later read fail: such a tail is moved out of the file when it is opened.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

_log = logging.getLogger(__name__)


class SleepersLock(JournalFileSymlinkLock):
    """The lock of a journal file, for a process that may be asleep while it holds it.

    Optuna's lock is taken from a process that keeps it for half a minute. If that process was stopped and wakes up, its
    `release` finds nothing and raises, which would end a worker that has only slept. What it was about to write is
    appended in one piece, so nothing is torn.
    """

    def release(self) -> None:
        """Give the lock back; one that was taken away meanwhile is nobody's loss."""
        try:
            super().release()
        except RuntimeError:
            _log.info("the lock of the journal was taken away while this process slept")


def journal(path: str) -> BaseStorage:
    """Optuna's journal-file storage: survives a kill, and several processes may share it.

    A record that was cut short is put aside first, with a line on stderr; the study goes on from the last whole one.
    """
    lock = SleepersLock(path)
    backend = JournalFileBackend(path, lock_obj=lock)
    lock.acquire()  # nobody is writing now
    try:
        _put_torn_tail_aside(Path(path))
    finally:
        lock.release()
    return JournalStorage(backend)


def _put_torn_tail_aside(path: Path) -> None:
    """Cut the file behind its last whole record, and keep what was cut in a file of its own."""
    with open(path, "rb+") as file:
        content = file.read()
        whole = _whole_length(content)
        if whole == len(content):
            return
        torn = path.with_name(f"{path.name}.torn")
        with open(torn, "ab") as kept:
            kept.write(content[whole:])
        file.truncate(whole)
        file.flush()
        os.fsync(file.fileno())
    print(
        f"warning: the last record of {path} was cut short, by a full disk or a power cut; it was moved to {torn}, and "
        "the study goes on from the record before it",
        file=sys.stderr,
    )


def _whole_length(content: bytes) -> int:
    """Bytes up to the end of the last record before the first that is not whole."""
    start = 0
    while start < len(content):
        end = content.find(b"\n", start) + 1
        if not end or not _is_record(content[start:end]):
            return start
        start = end
    return start


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
