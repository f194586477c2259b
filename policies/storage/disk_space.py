"""Check that the disk has enough space, before anything is written rather than after an hour."""

from __future__ import annotations

import shutil
from pathlib import Path

from bitpolicy.kernels.errors import BitPolicyError


def require_space(folder: Path, nbytes: int) -> None:
    """Refuse to write more than fits on the disk.

    Args:
        folder: a folder on the file system in question.

    Raises:
        BitPolicyError: fewer bytes than `nbytes` are free.
    """
    free = free_bytes(folder)
    if free < nbytes:
        raise BitPolicyError(
            f"{folder} has {free:,} bytes free, but the checkpoint needs at least {nbytes:,}; "
            "free some space or choose another --output-dir"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes on the file system of `folder`, which need not exist yet."""
    path = folder.resolve()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
