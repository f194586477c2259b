"""The study's journal: an append-only file of records that survives a kill, a full disk, a power cut and damage.

Optuna locks the file while it appends, but several things can go wrong that it does not handle. A process that was
stopped while it held the lock finds the lock taken away when it wakes up; a killed process leaves its lock behind. A
record cut short by a full disk or a power cut would make every later read fail, and a damaged record would be trusted.
So each record ends with a mark, a hash of the record and of the previous mark. When the file is opened, everything from
the first altered record on is moved out of it. Records of older versions have no marks.
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
_LONGEST_TAIL = 2**20  # bytes to search for the end of the last record
_POLL = 0.1


class SleepersLock(JournalFileSymlinkLock):
    """The lock of a journal file, safe for processes that are stopped or killed while they hold it.

    Optuna takes the lock away from a process that holds it for half a minute. If that process was only stopped and
    wakes up, its `release` finds no lock and raises, which would end a healthy worker. Its pending record is appended
    in one piece, so nothing is torn.

    The lock is a symlink to the journal, and Optuna reads the lock's age through it. Optuna's symlink dangles if the
    journal's path is relative or its folder was renamed, and processes then wait for it forever. This one links to the
    file name in the same folder.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._lock_target_file = os.path.basename(path)

    def acquire(self) -> bool:
        """Acquire the lock. A dangling lock, which would be waited for forever, is removed after a while."""
        end = time.monotonic() + (self.grace_period or 0)
        while os.path.islink(self._lock_file) and not os.path.exists(self._lock_file):
            if time.monotonic() > end:
                Path(self._lock_file).unlink(missing_ok=True)
            time.sleep(_POLL)
        return super().acquire()

    def release(self) -> None:
        """Release the lock, even if it was taken away in the meantime."""
        try:
            super().release()
        except RuntimeError:
            _log.info("the lock of the journal was taken away while this process slept")


class _Marked(JournalFileBackend):
    """Optuna's journal file, with a mark at the end of each appended record."""

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
    """Append all of the content, or nothing if the disk is full."""
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
    """The mark of the last record; empty if it has none."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_TAIL))
    found = _MARK.search(file.read())
    return found[1] if found else b""


def journal(path: str, alone: bool = False) -> BaseStorage:
    """Optuna's journal-file storage. It survives a kill, and several processes can share it.

    Damaged content is first moved aside, with a warning on stderr. The study then continues from the last good record.

    Args:
        alone: no other process uses the file, so an existing lock was left by a killed one.

    Raises:
        BitPolicyError: the path is not a file.
    """
    if os.path.lexists(path) and not os.path.isfile(path):
        raise BitPolicyError(f"the study's journal {path} is not a file; move it away, or use another folder")
    lock = SleepersLock(path)
    if alone:
        Path(lock._lock_file).unlink(missing_ok=True)
    backend = _Marked(path, lock_obj=lock)
    lock.acquire()  # so that no other process is writing
    try:
        _put_damage_aside(Path(path))
    finally:
        lock.release()
    return JournalStorage(backend)


def _put_damage_aside(path: Path) -> None:
    """Truncate the file after its last good record, and save what was cut in a separate file."""
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
        f"warning: {path} is cut short or damaged after record {count}, by a full disk or a power cut; the rest "
        f"was moved to {torn}, and the study continues from that record",
        file=sys.stderr,
    )


def _whole_length(content: bytes) -> int:
    """The number of bytes before the first altered record."""
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
