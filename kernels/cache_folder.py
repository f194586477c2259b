"""The folder for compiled kernels and timings: `$BITPOLICY_CACHE`, or `bitpolicy` in the user's cache folder.

Its files are loaded and executed, so they must belong to the user. If a folder or file belongs to someone else, or
others can write to it, a temporary folder replaces it for the lifetime of the process. The same happens for a user
without a home directory.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import sys
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile, mkdtemp


def cache_folder() -> Path:
    """The cache folder. It may not exist yet."""
    given = os.environ.get("BITPOLICY_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(given).expanduser() if given else Path(home).expanduser() / "bitpolicy"
    except RuntimeError:  # raised by expanduser for a user without a home directory
        return _private("there is no home directory")
    problem = _foreign(folder)
    return folder if problem is None else _private(problem)


def is_own(path: Path) -> bool:
    """Whether a cache file is safe to load: only this user or root can have written it."""
    return _foreign(path) is None


def keep(path: Path, content: bytes) -> bool:
    """Write a cache file atomically. Returns False if it cannot be written, which is harmless."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError:
        return False
    return True


def _foreign(path: Path) -> str | None:
    """Why someone else may have written this path; None if it is the user's own or does not exist yet.

    A path that does not exist is judged by its nearest existing parent folder.
    """
    if not hasattr(os, "geteuid"):
        return None
    for place in (path, *path.absolute().parents):
        try:
            found = place.stat()
        except OSError:
            continue
        if found.st_uid not in (os.geteuid(), 0):
            return f"{place} belongs to another user"
        others = stat.S_IWOTH | (0 if found.st_gid == os.getegid() else stat.S_IWGRP)  # many users have their own group
        sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX and place != path
        if found.st_mode & others and not sticky:
            return f"other users can write to {place}"
        return None
    return None


@cache
def _private(why: str) -> Path:
    """A temporary folder of this process, deleted at exit. Prints one warning."""
    folder = Path(mkdtemp(prefix="bitpolicy-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    print(
        f"warning: compiled kernels will not be kept because {why}; set BITPOLICY_CACHE to a folder of your own",
        file=sys.stderr,
    )
    return folder
