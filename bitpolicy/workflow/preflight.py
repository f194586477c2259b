"""Checks before a search begins, for problems that would otherwise stop it after hours. They write nothing."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.storage.disk_space import free_bytes
from bitpolicy.search.budget import decimal
from bitpolicy.search.quality.objective import objective_named
from bitpolicy.search.quality.psnr import Unavailable
from bitpolicy.search.study.study import open_storage
from bitpolicy.settings import Settings
from bitpolicy.workflow.decision import networks_of
from bitpolicy.workflow.forecast import Disk
from bitpolicy.workflow.plan import Plan

_FILES = ("sqlite:///", "journal:///")  # storages that are files, which are created when they are opened


def require_quality(settings: Settings, plan: Plan) -> None:
    """Check that the requested quality can be measured here.

    Raises:
        BitPolicyError: a network for --target-lpips or --objective is missing, --features contains none, or the
            pipeline's results are no images that the objective can compare.
    """
    networks = networks_of(settings, plan)
    networks.require()
    if settings.objective != "mse":
        distance = objective_named(settings.objective, networks).distance
        with closing(plan.trajectories.images(plan.split.search[:1])) as images:
            for image, _ in images:
                distance(image, image)
    if settings.target_lpips is None or networks.uncalibrated is not None:
        return
    if isinstance(networks.lpips, Unavailable):
        raise BitPolicyError(f"--target-lpips cannot be measured: {networks.lpips.reason}; {networks.lpips.remedy}")


def require_storage(url: str | None, dry_run: bool) -> None:
    """Check that the study's storage opens.

    Args:
        dry_run: whether a missing storage must not be created.

    Raises:
        BitPolicyError: it does not open.
    """
    if url is None:
        return
    file = next((Path(url.removeprefix(start)) for start in _FILES if url.startswith(start)), None)
    if file is not None and not file.parent.is_dir():
        raise BitPolicyError(f"--storage {url}: there is no folder {file.parent}; create it, or give another file")
    if dry_run and file is not None and not file.exists():
        return
    open_storage(url)


def require_disk(folder: Path, disk: Disk) -> None:
    """Check that the output folder has room for everything that a search writes.

    Raises:
        BitPolicyError: it does not.
    """
    free = free_bytes(folder)
    if free < disk.total:
        raise BitPolicyError(
            f"the disk of {folder} has {decimal(free)} free, and the search writes up to {decimal(disk.total)}: "
            f"{decimal(disk.checkpoint)} for the checkpoint, {decimal(disk.work)} in work/; free some space, choose "
            "another --output-dir, or use fewer --formats or --quantizer rtn"
        )
