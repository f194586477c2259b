"""The result of each trial of a study, as a row of trials.csv, independent of the study's storage."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.storage.atomic import write_text

FILE = "trials.csv"


@dataclass(frozen=True)
class TrialRow:
    """One finished trial.

    Attributes:
        number: of the trial; trials are numbered in the order in which they began.
        start: the start that it tries unchanged, e.g. "the exact solution"; empty for all other trials.
        score: mean of the objective over the search samples that it was scored on; mean squared image error, unless
            another objective was given.
        psnr_db: mean dB of those images that differ from the reference; None if none differ.
        samples: number of search samples it was scored on.
        stopped: whether it was stopped before it was scored on all of them.
        repeats: the earlier trial that tried the same policy; None for the first.
    """

    number: int
    start: str
    score: float
    psnr_db: float | None
    samples: int
    stopped: bool
    repeats: int | None


def save_trials(rows: Sequence[TrialRow], path: Path) -> None:
    """Write the file atomically. None becomes an empty field."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([field.name for field in fields(TrialRow)])
    table.writerows(asdict(row).values() for row in rows)
    write_text(path, text.getvalue())


def load_trials(path: Path) -> list[TrialRow]:
    """Read the file.

    Raises:
        BitPolicyError: it is not such a table.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [_row(**row) for row in csv.DictReader(file)]
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise BitPolicyError(f"cannot read {path}: {error}; run the same search again to write it") from error


def _row(number: str, start: str, score: str, psnr_db: str, samples: str, stopped: str, repeats: str) -> TrialRow:
    psnr, twin = float(psnr_db) if psnr_db else None, int(repeats) if repeats else None
    return TrialRow(int(number), start, float(score), psnr, int(samples), stopped == "True", twin)
