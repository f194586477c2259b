"""Files that go into an export as they are: linked where that costs nothing, else copied.

A hard link is one file under two names. It is safe as long as nobody writes into it in place: safetensors are only
ever written anew (safetensors from 0.8 on writes aside and renames, as bitpolicy does; older ones cut the file that is
there, so beside them files are copied). Text, which people edit, is always copied. Links of a hub cache's snapshot are
followed to the file itself.
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path

_RENAMES = [0, 8]  # the first version of safetensors that does not write into what is there


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
    renames = [int(part) for part in version("safetensors").split(".")[:2]] >= _RENAMES
    return renames and source.stat().st_dev == folder.stat().st_dev
