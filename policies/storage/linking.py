"""Files that go into an export unchanged: cloned or hard-linked where possible, which costs nothing, otherwise copied.

A clone (Btrfs, XFS) shares its blocks with the original until somebody writes to one of the two. On other file systems,
a hard link is one file under two names. That is safe as long as nobody writes into the file in place. safetensors files
are only ever replaced: the library writes a new file and renames it, as bitpolicy does. The model card says so. Text
files, which people edit, are always copied. Links in a snapshot of the hub's cache are followed to the file itself.
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
    """Make `target` a clone of `source` or a hard link to it, or a copy if neither is possible."""
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
    """Try to make `target` a separate file that shares the blocks of `source`; whether the file system did."""
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
    """Whether a file is on the file system of `folder`, which need not exist, and so can be linked into it."""
    while not folder.exists():
        folder = folder.parent
    return source.stat().st_dev == folder.stat().st_dev
