"""The folder with all that is known: the draw, the measured tests, and a line for each mutant tried.

Files are written aside and renamed, lines are written whole and flushed to the disk: a killed run loses one mutant.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mutation.covering import Measured
from mutation.mutants import Mutant, draw, fingerprint
from mutation.trial import Outcome


class Work:
    """What is known of the tree `root`, kept in `folder`."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        (folder / "tests").mkdir(parents=True, exist_ok=True)
        self._results = folder / "results.jsonl"
        if self._results.exists():
            whole, _, _ = self._results.read_text(encoding="utf-8").rpartition(
                "\n"
            )  # a killed run may leave half a line
            self._save("results.jsonl", whole and whole + "\n")

    def _save(self, name: str, text: str) -> None:
        part = self.folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.folder / name)

    def drawn(self, folders: Sequence[str], count: int, seed: int) -> list[Mutant]:
        """The mutants, drawn anew when the request or a source file changed."""
        files = sorted(
            p.relative_to(self.root).as_posix() for folder in folders for p in (self.root / folder).rglob("*.py")
        )
        request = {"seed": seed, "count": count, "files": {file: fingerprint(self.root, file) for file in files}}
        path = self.folder / "drawn.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if known.get("request") != request:
            mutants = draw(self.root, files, count, seed)
            known = {"request": request, "mutants": [asdict(mutant) for mutant in mutants]}
            self._save("drawn.json", json.dumps(known))
        return [Mutant(**mutant) for mutant in known["mutants"]]

    def measured(self, test_file: str) -> Measured | None:
        path = self.folder / "tests" / f"{test_file.replace('/', '.')}.json"
        return Measured(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def keep_measured(self, test_file: str, measured: Measured) -> None:
        self._save(f"tests/{test_file.replace('/', '.')}.json", json.dumps(asdict(measured)))

    def results(self) -> dict[tuple[str, str, str, int], Outcome]:
        """The outcome of every mutant tried so far, of any draw."""
        lines = self._results.read_text(encoding="utf-8").splitlines() if self._results.exists() else []
        entries = [json.loads(line) for line in lines]
        return {tuple(entry["mutant"]): Outcome(**entry["outcome"]) for entry in entries}

    def add(self, mutant: Mutant, outcome: Outcome, seconds: float) -> None:
        entry = {"mutant": mutant.key, "line": mutant.line, "outcome": asdict(outcome), "seconds": round(seconds, 2)}
        with self._results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
