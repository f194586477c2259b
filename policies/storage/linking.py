"""Files that go into an export as they are: cloned or linked where that costs nothing, else copied.

A clone (Btrfs, XFS) shares its blocks until somebody writes to one of the two. Where the file system has none, a hard
link is one file under two names. It is safe as long as nobody writes into it in place: safetensors are only ever
written anew (the library writes aside and renames, as bitpolicy does). The model card says so. Text, which people edit,
is always copied. Links of a hub cache's snapshot are followed to the file itself.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

if sys.platform == "linux":
    import fcntl

_FICLONE = 0x40049409  # linux/fs.h


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a clone of `source` or the same file, or a copy where they lie on different file systems."""
    if can_link(source, target.parent):
        if _clone(source, target):
            return
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # a file system without hard links, or another user's file
            pass
    shutil.copyfile(source, target)


def _clone(source: Path, target: Path) -> bool:
    """Whether the file system made `target` a file of its own that shares the blocks of `source`."""
    if sys.platform != "linux":
        return False
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new, _FICLONE, old.fileno())
            return True
        except OSError:
            pass
    target.unlink()
    return False


def can_link(source: Path, folder: Path) -> bool:
    """Whether a file can be linked into `folder`, which need not exist."""
    while not folder.exists():
        folder = folder.parent
    return source.stat().st_dev == folder.stat().st_dev
