"""One process at a time writes a folder.

The lock is a small file with the owner's process number, held by flock(2): the system gives it back when the process
ends, however it ends. It is removed by its owner only, who holds it while doing so; whoever waited for the removed file
sees that it is gone from its place and begins again.
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

NAME = ".bitpolicy-lock"  # of the lock in a folder that a process works in


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """While the block runs, no other process works in the folder, which is made if it is not there.

    Raises:
        BitPolicyError: another process does; or, at the end, the folder was removed meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / NAME, folder):
        yield


@contextmanager
def locked(lock: Path, folder: Path) -> Iterator[None]:
    """While the block runs, no other process gets this lock.

    Args:
        lock: its file, in a folder that is there.
        folder: what it stands for, to name in the error.

    Raises:
        BitPolicyError: another process holds it; or, at the end, it was removed meanwhile.
    """
    if sys.platform == "win32":  # nothing is locked there
        yield
        return
    descriptor = _acquired(lock, folder)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
        yield
        if not os.fstat(descriptor).st_nlink:
            raise BitPolicyError(
                f"{folder} was removed while it was being written, and what was in it with it; run the command again"
            )
    finally:
        with suppress(FileNotFoundError):  # the folder may have been removed meanwhile
            lock.unlink()
        os.close(descriptor)


def _acquired(lock: Path, folder: Path) -> int:
    """A descriptor of the lock's file, held."""
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
        os.close(descriptor)  # the one that held it removed it between our opening and our locking


def _owner(descriptor: int) -> str:
    process, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").partition(" ")
    if not process.isdigit():
        return "another process"
    return f"process {process}" if host == socket.gethostname() else f"process {process} on {host}"
