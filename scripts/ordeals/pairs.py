"""The ordeal of pairs: two processes work in one folder, one started a little later than the other.

Each must succeed or fail with one line. Afterwards the folder must be complete and equal that of a single run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from ordeals.artefacts import Artefacts
from ordeals.commands import Finished, command, start
from ordeals.judge import CRASH, HANG, OTHER, RAW, REFUSED, SAME, Verdict
from ordeals.undisturbed import Undisturbed, Work, works

_PATIENCE = 180.0


class Pairs:
    def __init__(self, made: Artefacts, seed: int) -> None:
        self._made, self._seed = made, seed
        self._whole = Undisturbed(made)
        self._works = {work.name: work for work in works(made)}
        self._psnr = ""

    def rounds(self, first: int, count: int) -> Iterator[tuple[str, Verdict, dict[str, Any]]]:
        for number in range(first, count):
            draw = Random(f"{self._seed} pair {number}")
            name = draw.choice(
                ("two searches", "two searches", "two exports", "two probes", "search and eval", "export and eval")
            )
            later = draw.choice((0.0, draw.uniform(0, 0.3), draw.uniform(0, 3)))
            folder = self._made.work / "paired" / "folder"
            shutil.rmtree(folder.parent, ignore_errors=True)
            folder.parent.mkdir()
            yield (
                f"pair: {name}",
                self._pair(name, folder, later),
                {"seed": self._seed, "pair": number, "later": round(later, 3)},
            )

    def _pair(self, name: str, folder: Path, later: float) -> Verdict:
        kinds = {"two searches": "search", "two exports": "export", "two probes": "probe", "search and eval": "search"}
        work = self._works[kinds.get(name, "export over an older one")]
        if name == "export and eval":
            shutil.copytree(self._whole.folder(work), folder)
        second = work.line(folder)
        if name.endswith("eval"):
            second = self._made.evaluate(folder / "checkpoint" if work.name == "search" else folder)
        one, other = start(work.line(folder)), None
        time.sleep(later)
        other = start(second)
        ended = [one.wait(_PATIENCE), other.wait(_PATIENCE)]
        return self._judged(name, work, folder, ended)

    def _judged(self, name: str, work: Work, folder: Path, ended: list[Finished]) -> Verdict:
        for process in ended:
            if complaint := process.complaint:
                outcome = HANG if process.code is None else CRASH if process.code < 0 else RAW
                return Verdict(outcome, f"{process.arguments[0]}: {complaint}")
        evaluates = name.endswith("eval")
        if evaluates and ended[1].code == 0 and ended[1].out != self._evaluation():
            return Verdict(OTHER, f"eval drew other images: {ended[1].out}, not {self._evaluation()}")
        if not any(process.code == 0 for process in (ended[:1] if evaluates else ended)):
            return Verdict(OTHER, f"neither succeeded: {ended[0].err} {ended[1].err}")
        names = sorted(path.name for path in folder.parent.iterdir())
        if names != [folder.name]:
            return Verdict(OTHER, f"left next to the folder: {names}")
        if difference := self._whole.difference(work, folder):
            return Verdict(OTHER, difference)
        return Verdict(SAME if all(process.code == 0 for process in ended) else REFUSED)

    def _evaluation(self) -> str:
        """What eval prints when it runs alone."""
        if not self._psnr:
            self._psnr = command(self._made.evaluate(self._made.run / "checkpoint")).require().out
        return self._psnr
