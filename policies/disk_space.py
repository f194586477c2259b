"""Is there room on the disk? Asked before anything is written, not found out after an hour."""

from __future__ import annotations

import shutil
from pathlib import Path

from bitpolicy.kernels.errors import BitPolicyError


def require_space(folder: Path, nbytes: int) -> None:
    """
    Args:
        folder: on the file system in question; it is there.

    Raises:
        BitPolicyError: fewer bytes than `nbytes` are free.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise BitPolicyError(
            f"{folder} has {free:,} bytes free, the checkpoint needs at least {nbytes:,}; "
            "free some space or choose another --output-dir"
        )
