"""Write outputs atomically: under a temporary name first, then renamed.

A killed process leaves the old output or none, never half of one. Outputs are flushed to the disk, so after a power
cut, too, there is the old output or the new one.
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

_UMASK = os.umask(0o077)  # the umask can only be read by setting it
os.umask(_UMASK)


def require_nameable(path: Path) -> None:
    """Check, before any work is done, that the file system accepts this name and that of the temporary sibling.

    Raises:
        BitPolicyError: the path, or a part of it, is too long.
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
                continue  # writing there will give a better message
            raise BitPolicyError(
                f"the file system cannot store {str(path)[:60]}...: the name {part[:20]}... has {len(part)} "
                "characters; choose a shorter one"
            ) from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; renamed to `path` if the block succeeds, removed if it does not.

    A link at `path` is replaced. Its target is left alone, because it may belong to somebody else.
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
        if aside.is_file():  # safetensors' own writer makes files that other users cannot read
            aside.chmod(0o666 & ~_UMASK)
        _flush(aside)
        _replace(aside, path)
        _flush_entry(path.parent)
    finally:
        _remove(aside)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def folder_written_aside(path: Path) -> Iterator[Path]:
    """Like `written_aside`, for a folder that one process at a time may write. If `path` is a link, the folder that it
    points to is replaced.

    Raises:
        BitPolicyError: another process is writing it.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.bitpolicy-lock"), path), written_aside(path) as aside:
        yield aside


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.bitpolicy-partial")  # a name that nothing else uses


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.bitpolicy-old")


def _flush(path: Path) -> None:
    """Flush a file, or everything in a folder, to the disk."""
    for entry in path.iterdir() if path.is_dir() else ():
        _flush(entry)
    _flush_entry(path)


def _flush_entry(path: Path) -> None:
    """Flush one file, or the names in one folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a folder on Windows, or already gone: nothing to flush
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems without fsync
            raise
    finally:
        os.close(descriptor)


def _replace(aside: Path, path: Path) -> None:
    if path.is_dir():  # a folder cannot be renamed onto one with files: move the old one out of the way first
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
