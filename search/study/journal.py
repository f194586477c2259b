"""The study's journal: a file that records are appended to, which survives a kill, a full disk, a power cut and damage.

Optuna locks the file while it appends. Several things may go wrong that it does not foresee. A process that was stopped
while it held the lock finds it taken away when it wakes up; one that was killed leaves it behind. A record that was cut
short, because the disk was full or the power went, would make every later read fail, and one that was damaged would be
believed. So each record ends with a mark, a hash of itself and of the mark before it, and all from the first record on
that is not as it was written is moved out of the file when it is opened. Records of older versions have no marks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import IO, Any

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from bitpolicy.kernels.errors import BitPolicyError

_log = logging.getLogger(__name__)
_MARK = re.compile(rb',"mark":"([0-9a-f]{16})"}\n\Z')
_LONGEST_TAIL = 2**20  # bytes in which the end of the last record is looked for
_POLL = 0.1


class SleepersLock(JournalFileSymlinkLock):
    """The lock of a journal file, for a process that may be asleep, or be killed, while it holds it.

    Optuna's lock is taken from a process that keeps it for half a minute. If that process was stopped and wakes up, its
    `release` finds nothing and raises, which would end a worker that has only slept. What it was about to write is
    appended in one piece, so nothing is torn.

    The lock is a link to the journal, whose age is asked for through the link. Optuna's leads nowhere if the journal's
    path is relative, or its folder was renamed, and is then waited for without an end. This one names its neighbour.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._lock_target_file = os.path.basename(path)

    def acquire(self) -> bool:
        """Get the lock; one that leads nowhere, and so would be waited for for ever, is nobody's after a while."""
        end = time.monotonic() + (self.grace_period or 0)
        while os.path.islink(self._lock_file) and not os.path.exists(self._lock_file):
            if time.monotonic() > end:
                Path(self._lock_file).unlink(missing_ok=True)
            time.sleep(_POLL)
        return super().acquire()

    def release(self) -> None:
        """Give the lock back; one that was taken away meanwhile is nobody's loss."""
        try:
            super().release()
        except RuntimeError:
            _log.info("the lock of the journal was taken away while this process slept")


class _Marked(JournalFileBackend):
    """Optuna's file, with a mark at the end of each record that is appended."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._lock.acquire()
        try:
            with open(self._file_path, "rb+") as file:
                mark, lines = _last_mark(file), []
                for log in logs:
                    body = json.dumps(log, separators=(",", ":")).encode()[:-1]
                    mark = _mark(mark, body)
                    lines.append(body + b',"mark":"' + mark + b'"}\n')
                _append(file, b"".join(lines))
        finally:
            self._lock.release()


def _append(file: IO[bytes], content: bytes) -> None:
    """All of it or, where the disk is full, nothing."""
    length = file.seek(0, os.SEEK_END)
    try:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), length)
        raise


def _mark(before: bytes, body: bytes) -> bytes:
    return hashlib.sha256(before + body).hexdigest()[:16].encode()


def _last_mark(file: IO[bytes]) -> bytes:
    """That of the last record; nothing if it has none."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_TAIL))
    found = _MARK.search(file.read())
    return found[1] if found else b""


def journal(path: str, alone: bool = False) -> BaseStorage:
    """Optuna's journal-file storage: survives a kill, and several processes may share it.

    What is not as it was written is put aside first, with a line on stderr; the study goes on from the record before.

    Args:
        alone: no other process uses it, so a lock that is there was left by one that was killed.

    Raises:
        BitPolicyError: what is there is no file.
    """
    if os.path.lexists(path) and not os.path.isfile(path):
        raise BitPolicyError(
            f"{path} is to be the study's journal, and is no file; move it away, or give another folder"
        )
    lock = SleepersLock(path)
    if alone:
        Path(lock._lock_file).unlink(missing_ok=True)
    backend = _Marked(path, lock_obj=lock)
    lock.acquire()  # nobody is writing now
    try:
        _put_damage_aside(Path(path))
    finally:
        lock.release()
    return JournalStorage(backend)


def _put_damage_aside(path: Path) -> None:
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
    count = content[:whole].count(b"\n")
    print(
        f"warning: {path} was cut short or damaged behind its record {count}, by a full disk or a power cut; the rest "
        f"was moved to {torn}, and the study goes on from that record",
        file=sys.stderr,
    )


def _whole_length(content: bytes) -> int:
    """Bytes up to the end of the last record before the first that is not as it was written."""
    start, before = 0, b""
    while start < len(content):
        end = content.find(b"\n", start) + 1
        line = content[start:end]
        if not end or not _is_record(line):
            return start
        mark = _MARK.search(line)
        found = mark[1] if mark else b""
        if (found or before) and found != _mark(before, line[: mark.start()] if mark else line):
            return start
        start, before = end, found
    return start


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
