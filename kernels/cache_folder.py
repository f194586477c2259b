"""Where this machine keeps what it has compiled and timed: `$BITPOLICY_CACHE`, else `bitpolicy` in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import NamedTemporaryFile


def cache_folder() -> Path:
    """The folder; it need not exist."""
    given = os.environ.get("BITPOLICY_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bitpolicy"


def keep(path: Path, content: bytes) -> bool:
    """Write a file of the cache aside and rename it; False where it cannot be written, which harms nobody."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return False
    return True
