"""Outputs are written aside and renamed: a killed process leaves the old thing or nothing, never half of one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitpolicy.kernels.errors import BitPolicyError

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
    """A temporary sibling of `path` to write to; renamed to `path` if the block succeeds, removed if it does not."""
    path = path.resolve()  # what a link leads to is replaced, and "." has a name
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = _aside(path), path.with_name(f".{path.name}.old")
    _remove(aside)
    if old.exists() and not path.exists():  # a process was killed between the two renames below
        old.rename(path)
    _remove(old)
    try:
        yield aside
        if aside.is_file():  # safetensors' own writer lets nobody else read what it writes
            aside.chmod(0o666 & ~_UMASK)
        _replace(aside, path)
    finally:
        _remove(aside)


def write_text(path: Path, text: str) -> None:
    """Write a text file, aside and renamed."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _replace(aside: Path, path: Path) -> None:
    if path.is_dir():  # a folder cannot be renamed onto a full one: move the old one out of the way first
        old = path.with_name(f".{path.name}.old")
        path.rename(old)
        aside.rename(path)
        _remove(old)
    else:
        if aside.is_dir():
            path.unlink(missing_ok=True)
        os.replace(aside, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
