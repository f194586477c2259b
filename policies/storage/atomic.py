"""Outputs are written aside and renamed: a killed process leaves the old thing or nothing, never half of one.

What was renamed is on the disk: a power cut leaves the old thing or the new one, too.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.storage.folder_lock import locked

_UMASK = os.umask(0o077)  # it can be read only by setting it
os.umask(_UMASK)


def require_nameable(path: Path) -> None:
    """Find out before the work whether the file system takes this name, and that of the temporary sibling.

    Raises:
        BitPolicyError: a part of the path is too long, or the path as a whole.
    """
    path = path.resolve()
    there = next(parent for parent in path.parents if os.path.lexists(parent))
    for part in [*path.relative_to(there).parts, _aside(path).name]:
        try:
            (there / part).lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                continue  # whoever writes there gets a better word than this look
            raise BitPolicyError(
                f"the file system cannot hold {str(path)[:60]}...: its name {part[:20]}... has {len(part)} characters; "
                "give a shorter one"
            ) from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; renamed to `path` if the block succeeds, removed if it does not.

    A link at `path` is replaced. What it leads to is left alone: it may be anybody's.
    """
    path = path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = _aside(path), _old(path)
    _remove(aside)
    if old.exists() and not path.exists():  # a process was killed between the two renames below
        old.rename(path)
    _remove(old)
    try:
        yield aside
        if aside.is_file():  # safetensors' own writer lets nobody else read what it writes
            aside.chmod(0o666 & ~_UMASK)
        _settle(aside)
        _replace(aside, path)
        _settle_entry(path.parent)
    finally:
        _remove(aside)


def write_text(path: Path, text: str) -> None:
    """Write a text file, aside and renamed."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def folder_written_aside(path: Path) -> Iterator[Path]:
    """The same for a folder, by one process at a time; where `path` is a link, the folder that it leads to is replaced.

    Raises:
        BitPolicyError: another process is writing it.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.bitpolicy-lock"), path), written_aside(path) as aside:
        yield aside


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.bitpolicy-partial")  # a name that nobody else gives


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.bitpolicy-old")


def _settle(path: Path) -> None:
    """Have the system write a file, or all of a folder, to the disk."""
    for entry in path.iterdir() if path.is_dir() else ():
        _settle(entry)
    _settle_entry(path)


def _settle_entry(path: Path) -> None:
    """Have it write one file, or the names in one folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a folder on Windows, or gone already: there is nothing to wait for
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that have no fsync
            raise
    finally:
        os.close(descriptor)


def _replace(aside: Path, path: Path) -> None:
    if path.is_dir():  # a folder cannot be renamed onto a full one: move the old one out of the way first
        old = _old(path)
        path.rename(old)
        aside.rename(path)
        _remove(old)
    else:
        if aside.is_dir():
            path.unlink(missing_ok=True)
        os.replace(aside, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
