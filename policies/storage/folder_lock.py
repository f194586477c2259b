"""A lock that lets one process at a time write to a folder.

The lock is a small file with the owner's process number, locked with flock(2): the system releases it when the process
ends, however it ends. Only the owner removes the file, and still holds the lock while doing so. A process that locks
the removed file sees that it is no longer in its place and starts over.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bitpolicy.kernels.errors import BitPolicyError

if sys.platform != "win32":
    import fcntl

NAME = ".bitpolicy-lock"  # of the lock file in a folder that a process works in


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs; the folder is created if needed.

    Raises:
        BitPolicyError: another process works in it; or, at the end, the folder has been removed in the meantime.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / NAME, folder):
        yield


@contextmanager
def locked(lock: Path, folder: Path) -> Iterator[None]:
    """Hold a lock while the block runs.

    Args:
        lock: the lock file, in a folder that exists.
        folder: what the lock protects, for the error message.

    Raises:
        BitPolicyError: another process holds the lock; or, at the end, it has been removed in the meantime.
    """
    if sys.platform == "win32":  # no locking there
        yield
        return
    descriptor = _acquired(lock, folder)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
        yield
        if not os.fstat(descriptor).st_nlink:
            raise BitPolicyError(
                f"{folder} was removed while it was being written, with everything in it; run the command again"
            )
    finally:
        with suppress(FileNotFoundError):  # the folder may have been removed in the meantime
            lock.unlink()
        os.close(descriptor)


def _acquired(lock: Path, folder: Path) -> int:
    """A descriptor of the lock file, with the lock held."""
    assert sys.platform != "win32"
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(descriptor)
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise BitPolicyError(
                f"{folder} is being written by {owner}; wait until it is done, or choose another --output-dir"
            ) from None
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == lock.stat().st_ino:
                return descriptor
        os.close(descriptor)  # its owner removed it after we opened it and before we locked it


def _owner(descriptor: int) -> str:
    process, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").partition(" ")
    if not process.isdigit():
        return "another process"
    return f"process {process}" if host == socket.gethostname() else f"process {process} on {host}"
