"""Where this machine keeps what it has compiled and timed: `$BITPOLICY_CACHE`, else `bitpolicy` in the user's cache.

What lies there is loaded and run, so it has to be the user's own. A folder or a file that belongs to somebody else, or
that others may write to, is not used: a temporary folder takes its place while the process runs. The same goes for a
user without a home directory.
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
    """The folder; it need not exist."""
    given = os.environ.get("BITPOLICY_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(given).expanduser() if given else Path(home).expanduser() / "bitpolicy"
    except RuntimeError:  # expanduser's word for a user without a home directory
        return _private("there is no home directory")
    problem = _foreign(folder)
    return folder if problem is None else _private(problem)


def is_own(path: Path) -> bool:
    """Whether a file of the cache may be loaded: nobody but this user, or root, can have written it."""
    return _foreign(path) is None


def keep(path: Path, content: bytes) -> bool:
    """Write a file of the cache aside and rename it; False where it cannot be written, which harms nobody."""
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
    """Why what is at a path may be somebody else's work; None where it is the user's own, or not there yet.

    A folder that is not there is judged by the one in which it would be made.
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
        others = stat.S_IWOTH | (0 if found.st_gid == os.getegid() else stat.S_IWGRP)  # many users have a group of one
        sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX and place != path
        if found.st_mode & others and not sticky:
            return f"others may write to {place}"
        return None
    return None


@cache
def _private(why: str) -> Path:
    """A folder of this process's own, removed when it ends; says so once."""
    folder = Path(mkdtemp(prefix="bitpolicy-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    print(
        f"warning: compiled kernels are not kept, as {why}; set BITPOLICY_CACHE to a folder of your own",
        file=sys.stderr,
    )
    return folder
