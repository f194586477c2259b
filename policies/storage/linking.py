"""Files that go into an export as they are: linked where that costs nothing, else copied.

A hard link is one file under two names. It is safe as long as nobody writes into it in place: safetensors are only
ever written anew (the library writes aside and renames, as bitpolicy does). Text, which people edit, is always copied.
Links of a hub cache's snapshot are followed to the file itself.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or the same content where they lie on different file systems."""
    if can_link(source, target.parent):
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # a file system without hard links, or another user's file
            pass
    shutil.copyfile(source, target)


def can_link(source: Path, folder: Path) -> bool:
    """Whether a file can be linked into `folder`, which need not exist."""
    while not folder.exists():
        folder = folder.parent
    return source.stat().st_dev == folder.stat().st_dev
