"""The ordeal of full disks: a command writes to a file system with a limit on bytes or inodes, which is then raised.

The command must report the full disk in one line. Run again with room, it must leave the bytes of an undisturbed run.
The file system is a tmpfs, which needs root. Without root, a limit on the size of a file is set instead, and larger
writes fail with their own error. Commands check the free space before they write. The processes here always see plenty
of it, because another process may fill the disk later.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from ordeals.artefacts import Artefacts
from ordeals.commands import Finished, start
from ordeals.judge import CRASH, HANG, OTHER, RAW, REFUSED, SAME, Verdict
from ordeals.undisturbed import Undisturbed, Work, works

_PATIENCE = 120.0
_PAGE = 4096
_ROOMY = "size=256m,nr_inodes=100k"


class Disks:
    def __init__(self, made: Artefacts, seed: int) -> None:
        self._made, self._seed = made, seed
        self._whole, self._works = Undisturbed(made), works(made)
        self._disk = made.work / "disk"
        self._disk.mkdir(exist_ok=True)
        self.mounts = _mounted(self._disk, _ROOMY) and _unmounted(self._disk)

    def rounds(self, first: int, count: int) -> Iterator[tuple[str, Verdict, dict[str, Any]]]:
        for number in range(first, count):
            draw = Random(f"{self._seed} disk {number}")
            work = draw.choice([w for w in self._works for _ in range(3 if w.name == "search" else 1)])
            row, verdict, full = (self._on_tmpfs if self.mounts else self._under_limit)(work, draw)
            yield f"{row}: {work.name}", verdict, {"seed": self._seed, "disk": number, "limit": full}

    def _on_tmpfs(self, work: Work, draw: Random) -> tuple[str, Verdict, str]:
        needed, files = _size(self._whole.folder(work))
        if draw.random() < 0.75:
            limit = f"size={draw.randint(1, 11 * needed // (10 * _PAGE)) * _PAGE},nr_inodes=100k"
        else:
            limit = f"size=256m,nr_inodes={draw.randint(2, 2 * files)}"
        if work.over:  # the older export must fit
            limit = f"size={needed + draw.randint(1, needed // _PAGE) * _PAGE},nr_inodes=100k"
        _mounted(self._disk, limit)
        folder = self._disk / "folder"
        try:
            if work.over:
                shutil.copytree(self._whole.folder(work), folder)
            full = start(work.line(folder), first=_plenty).wait(_PATIENCE)
            if verdict := self._after(work, full, folder):
                return "full disk", verdict, limit
            subprocess.run(["mount", "-o", f"remount,{_ROOMY}", str(self._disk)], check=True, capture_output=True)
            return "full disk", self._with_room(work, full, folder), limit
        finally:
            _unmounted(self._disk)

    def _under_limit(self, work: Work, draw: Random) -> tuple[str, Verdict, str]:
        needed = max(path.stat().st_size for path in self._whole.folder(work).rglob("*") if path.is_file())
        limit = draw.randint(1, needed)
        folder = self._disk / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        if work.over:
            shutil.copytree(self._whole.folder(work), folder)
        full = start(work.line(folder), first=partial(_limited, limit)).wait(_PATIENCE)
        verdict = self._after(work, full, folder) or self._with_room(work, full, folder)
        return "file too large", verdict, f"RLIMIT_FSIZE {limit}"

    def _after(self, work: Work, full: Finished, folder: Path) -> Verdict | None:
        """What is wrong while the disk is full, or None."""
        if complaint := full.complaint:
            outcome = HANG if full.code is None else CRASH if full.code < 0 else RAW
            return Verdict(outcome, complaint)
        if work.over and (difference := self._whole.difference(work, folder)):
            return Verdict(OTHER, f"the older export is lost: {difference}")
        return None

    def _with_room(self, work: Work, full: Finished, folder: Path) -> Verdict:
        if full.code == 2 or work.name == "search":
            ended = start(work.line(folder)).wait(_PATIENCE)
            if ended.code != 0:
                return Verdict(RAW, f"with room: {ended.complaint or ended.err}")
        if difference := self._whole.difference(work, folder):
            return Verdict(OTHER, f"with room: {difference}")
        return Verdict(REFUSED if full.code == 2 else SAME)


def _plenty() -> None:
    """Make every disk look large to this process."""
    shutil.disk_usage = lambda path: SimpleNamespace(total=10**15, used=0, free=10**15)  # type: ignore[assignment]


def _limited(nbytes: int) -> None:
    _plenty()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def _size(folder: Path) -> tuple[int, int]:
    """Bytes in whole pages, and number of files."""
    found = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // _PAGE) * _PAGE for size in found), len(list(folder.rglob("*"))) + 2


def _mounted(folder: Path, limit: str) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    line = ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(folder)]
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


def _unmounted(folder: Path) -> bool:
    return subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False).returncode == 0
