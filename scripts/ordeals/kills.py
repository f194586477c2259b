"""The ordeal of kills: SIGKILL at a random moment, one to three times, then the same command to its end.

It must leave what an undisturbed run leaves, byte for byte.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from ordeals.artefacts import Artefacts
from ordeals.commands import Running, start, start_fresh
from ordeals.judge import CRASH, HANG, OTHER, RAW, SAME, Verdict
from ordeals.undisturbed import Undisturbed, Work, works

_PATIENCE = 120.0
_FRESH = 25  # one round in this many starts its processes as a shell does


class Kills:
    def __init__(self, made: Artefacts, seed: int) -> None:
        self._made, self._seed = made, seed
        self._whole, self._works = Undisturbed(made), works(made)
        self._takes: dict[str, float] = {}

    def rounds(self, first: int, kills: int) -> Iterator[tuple[str, Verdict, dict[str, Any]]]:
        """One result for each kill. The last kill of a round has the round's verdict; earlier ones count as `SAME`."""
        number = first
        while number < kills:
            draw = Random(f"{self._seed} kill {number}")
            work = draw.choice([w for w in self._works for _ in range(3 if w.name == "search" else 1)])
            wanted = min(draw.randint(1, 3), kills - number)
            verdict, after = self._round(work, wanted, draw, fresh=number % _FRESH == _FRESH - 1)
            for i in range(wanted):
                last = i == wanted - 1
                about = {"seed": self._seed, "kill": number, "seconds": [round(s, 3) for s in after]}
                yield f"killed: {work.name}", verdict if last else Verdict(SAME), about
            number += wanted

    def _round(self, work: Work, kills: int, draw: Random, fresh: bool) -> tuple[Verdict, list[float]]:
        folder = self._made.work / "killed" / "folder"
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        if work.over:
            shutil.copytree(self._whole.folder(work), folder)
        takes, after = self._time(work), []
        begin = start_fresh if fresh else start
        for _ in range(kills):
            running = begin(work.line(folder))
            after.append(draw.uniform(0, 1.1) * takes + (draw.uniform(2, 8) if fresh else 0))
            _killed_after(running, after[-1])
            if complaint := self._after_kill(work, folder):
                return Verdict(OTHER, complaint), after
        ended = start(work.line(folder)).wait(_PATIENCE)
        if work.name == "export" and ended.code == 2 and "--overwrite" in ended.err:  # it had finished before the kill
            ended = start([*work.line(folder), "--overwrite"]).wait(_PATIENCE)
        if ended.code != 0:
            outcome = HANG if ended.code is None else CRASH if ended.code < 0 else RAW
            return Verdict(outcome, ended.complaint or ended.err), after
        names = sorted(path.name for path in folder.parent.iterdir())
        if names != [folder.name]:
            return Verdict(OTHER, f"left next to the folder: {names}"), after
        difference = self._whole.difference(work, folder)
        return (Verdict(SAME) if difference is None else Verdict(OTHER, difference)), after

    def _after_kill(self, work: Work, folder: Path) -> str | None:
        """What is wrong with an exported folder, or None: if it exists, it must be complete at any moment."""
        if not work.name.startswith("export") or not folder.exists():
            return None
        return self._whole.difference(work, folder)

    def _time(self, work: Work) -> float:
        """Seconds that the work takes undisturbed."""
        if work.name not in self._takes:
            folder = self._made.work / "timed"
            shutil.rmtree(folder, ignore_errors=True)
            since = time.monotonic()
            start(work.line(folder)).wait(_PATIENCE).require()
            self._takes[work.name] = time.monotonic() - since
            shutil.rmtree(folder)
        return self._takes[work.name]


def _killed_after(running: Running, seconds: float) -> None:
    end = time.monotonic() + seconds
    while running.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    running.kill()
    running.wait(1)
