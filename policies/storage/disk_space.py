"""Is there room on the disk? Asked before anything is written, not found out after an hour."""

from __future__ import annotations

import shutil
from pathlib import Path

from bitpolicy.kernels.errors import BitPolicyError


def require_space(folder: Path, nbytes: int) -> None:
    """
    Args:
        folder: on the file system in question.

    Raises:
        BitPolicyError: fewer bytes than `nbytes` are free.
    """
    free = free_bytes(folder)
    if free < nbytes:
        raise BitPolicyError(
            f"{folder} has {free:,} bytes free, the checkpoint needs at least {nbytes:,}; "
            "free some space or choose another --output-dir"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes where `folder` is, or will be: it may not be there yet."""
    path = folder.resolve()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
