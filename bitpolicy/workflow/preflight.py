"""What a search could fail at after hours, found out before it begins. Nothing is written."""

from __future__ import annotations

from pathlib import Path

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.storage.disk_space import free_bytes
from bitpolicy.search.budget import decimal
from bitpolicy.search.quality.psnr import Unavailable
from bitpolicy.search.study.study import open_storage
from bitpolicy.settings import Settings
from bitpolicy.workflow.decision import networks_of
from bitpolicy.workflow.forecast import Disk
from bitpolicy.workflow.plan import Plan

_FILES = ("sqlite:///", "journal:///")  # storages that are files, which opening makes


def require_quality(settings: Settings, plan: Plan) -> None:
    """Check that the quality asked for can be measured here.

    Raises:
        BitPolicyError: a network for --target-lpips is missing, or --features holds none.
    """
    networks = networks_of(settings, plan)
    networks.require()
    if settings.target_lpips is None or networks.uncalibrated is not None:
        return
    if isinstance(networks.lpips, Unavailable):
        raise BitPolicyError(f"--target-lpips cannot be measured: {networks.lpips.reason}; {networks.lpips.remedy}")


def require_storage(url: str | None, dry_run: bool) -> None:
    """Check that the study's storage opens.

    Args:
        dry_run: whether a storage that is not there yet must not be made.

    Raises:
        BitPolicyError: it does not.
    """
    if url is None:
        return
    file = next((Path(url.removeprefix(start)) for start in _FILES if url.startswith(start)), None)
    if file is not None and not file.parent.is_dir():
        raise BitPolicyError(f"--storage {url}: there is no folder {file.parent}; make it, or name another file")
    if dry_run and file is not None and not file.exists():
        return
    open_storage(url)


def require_disk(folder: Path, disk: Disk) -> None:
    """Check that the output folder has room for all that a search writes.

    Raises:
        BitPolicyError: it has not.
    """
    free = free_bytes(folder)
    if free < disk.total:
        raise BitPolicyError(
            f"the disk of {folder} has {decimal(free)} free, and the search writes up to {decimal(disk.total)}: "
            f"{decimal(disk.checkpoint)} of checkpoint, {decimal(disk.work)} in work/; free some space, choose another "
            "--output-dir, or take fewer --formats or --quantizer rtn"
        )
