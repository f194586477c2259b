"""What each command leaves when nothing disturbs it, and a comparison of folders with that, file by file.

Files with the time of day or a process number differ between any two runs. They are compared without those values:
result.json (seconds, name of the output folder), trials.csv and study.journal (when trials started and ended, and who
made them). The journal's trials also depend on how often a search was stopped: trials that a killed search had started
stay in it as failed. These commands do not write report.html.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ordeals.artefacts import Artefacts, without_times
from ordeals.commands import command, files_in

_LEFT_OUT = ("study.journal", "study.journal.torn")
_TIMED = ("datetime_start", "datetime_complete", "duration", "seconds")
_PARTIAL = ("-partial", "-old", "-lock", ".lock", ".torn")


@dataclass(frozen=True)
class Work:
    """A command that writes one folder.

    Attributes:
        name: the name of its row.
        line: its command line for a folder.
        over: whether the folder exists before it starts.
    """

    name: str
    line: Callable[[Path], list[str]]
    over: bool = False


def works(made: Artefacts) -> list[Work]:
    return [
        Work("search", made.search),
        Work("probe", made.probe),
        Work("export", made.export),
        Work("export over an older one", lambda folder: made.export(folder, "--overwrite"), over=True),
    ]


class Undisturbed:
    """The folders that the commands leave, each made on first use."""

    def __init__(self, made: Artefacts) -> None:
        self._made = made
        self._seconds: dict[str, float] = {}

    def folder(self, work: Work) -> Path:
        path = self._made.work / "undisturbed" / work.name.replace(" ", "-")
        if not path.exists():
            command(work.line(path)).require()
        return path

    def difference(self, work: Work, folder: Path) -> str | None:
        """How the folder differs from the undisturbed one, or None."""
        expected, found = contents(self.folder(work)), contents(folder)
        if leftovers := [name for name in found if name.endswith(_PARTIAL) or "partial" in name]:
            return f"left behind: {', '.join(leftovers)}"
        if expected.keys() != found.keys():
            return f"files {sorted(expected.keys() ^ found.keys())[:5]} are in one of the two folders only"
        odd = [name for name, data in expected.items() if found[name] != data]
        return f"other bytes in {', '.join(odd[:5])}" if odd else None


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too, without the values that differ between any two runs."""
    found = {name: data for name, data in files_in(folder).items() if name not in _LEFT_OUT}
    for name, rewrite in (("result.json", _untimed_result), ("trials.csv", _untimed_trials)):
        if name in found:
            found[name] = rewrite(found[name].decode())
    return found


def _untimed_result(text: str) -> bytes:
    held = without_times(text)
    held.pop("sha256", None)
    return repr(sorted(held.items())).encode()


def _untimed_trials(text: str) -> bytes:
    """The finished trials, without their times and numbers."""
    rows = csv.DictReader(io.StringIO(text))
    kept = [{k: v for k, v in row.items() if k not in ("number", *_TIMED)} for row in rows]
    return repr(kept).encode()
