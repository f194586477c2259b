"""The results of all cases: a table to read, and JSON from which a stopped run resumes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ordeals.judge import FORBIDDEN, OUTCOMES, Verdict

_EVERY = 20.0  # seconds between writes of the JSON file


@dataclass
class Tally:
    """Counts by row and outcome.

    Attributes:
        seed: the seed of the run.
        done: part -> number of finished cases, which is also the number of the next case.
        bad: each forbidden case, with what is needed to repeat it.
        notes: remarks for the reader, such as why a part was skipped.
    """

    seed: int
    done: dict[str, int] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    bad: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, part: str, row: str, verdict: Verdict, about: dict[str, Any]) -> None:
        row_counts = self.counts.setdefault(row, {})
        row_counts[verdict.outcome] = row_counts.get(verdict.outcome, 0) + 1
        self.done[part] = self.done.get(part, 0) + 1
        if verdict.forbidden:
            self.bad.append({"part": part, "row": row, "outcome": verdict.outcome, **about, "detail": verdict.detail})

    @property
    def total(self) -> int:
        return sum(sum(row.values()) for row in self.counts.values())

    def table(self) -> str:
        """Markdown: a row for each kind of artefact, a column for each outcome."""
        head = ["", "cases", *OUTCOMES]
        rows = [
            [name, str(sum(row.values())), *(str(row.get(o, 0) or "") for o in OUTCOMES)]
            for name, row in self.counts.items()
        ]
        sums = [sum(row.get(outcome, 0) for row in self.counts.values()) for outcome in OUTCOMES]
        rows.append(["all", str(self.total), *map(str, sums)])
        lines = ["| " + " | ".join(row) + " |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows]]
        return "\n".join([*lines, "", *self.notes])

    def save(self, path: Path) -> None:
        aside = path.with_name(f"{path.name}.partial")
        aside.write_text(json.dumps(vars(self), indent=1) + "\n")
        aside.replace(path)

    @classmethod
    def load(cls, path: Path, seed: int) -> Tally:
        """The tally of a stopped run with the same seed, or an empty one."""
        found = cls(**json.loads(path.read_text())) if path.is_file() else cls(seed)
        return found if found.seed == seed else cls(seed)

    @property
    def failed(self) -> bool:
        return any(row.get(outcome) for row in self.counts.values() for outcome in FORBIDDEN)


class Progress:
    """Prints the time left on stderr and keeps the JSON file up to date."""

    def __init__(self, tally: Tally, path: Path | None, quiet: bool) -> None:
        self._tally, self._path, self._quiet = tally, path, quiet
        self._began = self._saved = self._said = time.monotonic()

    def step(self, part: str, over: int, of: int, since: float, first: int) -> None:
        """Call after a case: `over` of `of` are done, `first` of them before the time `since`."""
        now = time.monotonic()
        if self._path is not None and now - self._saved > _EVERY:
            self.save()
        if not self._quiet and (now - self._said > 2 or over == of):
            self._said = now
            left = (now - since) / max(over - first, 1) * (of - over)
            bad = len(self._tally.bad)
            end = "\n" if over == of or not sys.stderr.isatty() else ""
            print(
                f"\r{part}: {over} of {of}, {left / 60:.1f} min left, {bad} bad  ", end=end, file=sys.stderr, flush=True
            )

    def save(self) -> None:
        now = time.monotonic()
        self._tally.seconds += now - self._saved
        self._saved = now
        if self._path is not None:
            self._tally.save(self._path)
