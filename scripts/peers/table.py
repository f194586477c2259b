"""The table and the plots: bytes against PSNR, SSIM and the other available metrics, with paired bootstrap intervals.

All rivals are resampled with the same draws, so the interval of a difference is that of the paired differences (Efron &
Tibshirani 1993, chapter 13). The draws are of prompts, each with all its images. On the bundled pipeline, two seeds of
one prompt score within tenths of a decibel of each other, so they are not independent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peers.entry import MODEL, SHARES, Entry, read_entries
from peers.metrics import measured
from peers.plot import draw_all, draw_six, read_points
from peers.samples import captions_shown
from peers.scoring import REFERENCE, Scores, decibels
from peers.selection import read_selection

_DRAWS = 10_000


@dataclass(frozen=True)
class Row:
    """One rival at one size.

    Attributes:
        values: metric -> value of each image.
        totals: metric -> one value for all images.
        missing: metric -> why it has no value.
        prompts: the prompt of each image.
    """

    share: float
    entry: Entry
    values: dict[str, list[float]]
    totals: dict[str, float]
    missing: dict[str, str]
    prompts: Sequence[str]

    @property
    def images(self) -> int:
        return len(self.values["psnr"])

    def with_interval(self, metric: str) -> tuple[float, float, float]:
        """The mean and the ends of its interval."""
        return float(np.mean(self.values[metric])), *interval(self.values[metric], self.prompts)

    def behind(self, best: Row) -> tuple[float, float, float]:
        """The paired difference in PSNR to another row, over the images that both have."""
        pairs = zip(self.values["psnr"], best.values["psnr"], strict=False)
        differences = [own - other for own, other in pairs]
        return float(np.mean(differences)), *interval(differences, self.prompts)


def interval(values: Sequence[float], prompts: Sequence[str]) -> tuple[float, float]:
    """95% bootstrap interval of the mean over images, drawn by prompt; the draws depend only on the prompts.

    Args:
        values: the value of each image.
        prompts: the prompt of each sample, at least as many as values.
    """
    names = list(dict.fromkeys(prompts[: len(values)]))
    which = np.array([names.index(prompt) for prompt in prompts[: len(values)]])
    counts, sums = np.bincount(which), np.bincount(which, np.asarray(values, dtype=np.float64))
    rows = np.random.default_rng(0).integers(0, len(names), (_DRAWS, len(names)))
    low, high = np.percentile(sums[rows].sum(1) / counts[rows].sum(1), (2.5, 97.5))
    return float(low), float(high)


def write_table(scores: Scores, work: Path, reference: int, images: int, output: Path) -> None:
    """Write `output`.md, .json, .png and -all.png from the scores so far."""
    rows = measured_rows(scores, work, images)
    output.parent.mkdir(parents=True, exist_ok=True)
    missing = {name: reason for row in rows for name, reason in row.missing.items()}
    parts = [part for share in SHARES for part in _section(share, rows, reference)]
    text = "\n".join([*parts, *(f"{name}: {reason}." for name, reason in missing.items())])
    output.with_suffix(".md").write_text(text + "\n")
    output.with_suffix(".json").write_text(json.dumps([_as_json(row, reference) for row in rows], indent=1) + "\n")
    points = read_points(output.with_suffix(".md"))
    draw_six(points, output.with_suffix(".png"))
    draw_all(points, output.with_name(f"{output.name}-all.png"))
    print(text)


def measured_rows(scores: Scores, work: Path, images: int) -> list[Row]:
    """Every selected entry that has images, at every size that it was selected for."""
    entries = {entry.name: entry for entry in read_entries(work / "candidates")}
    chosen, rows = read_selection(work / "selected.json"), []
    for share in SHARES:
        for names in chosen.values():
            entry = entries.get(names.get(f"{share:.2f}", ""))
            errors = _evenly(scores.errors(entry.name, "held_out", images, make=False), scores) if entry else []
            if entry and errors:
                rows.append(_row(scores, work, share, entry, errors))
    return rows


def _evenly(errors: list[float], scores: Scores) -> list[float]:
    """The errors of an unfinished entry, cut so that every prompt has the same number of images."""
    prompts = len({*scores.prompts("held_out")})
    return errors[: max(len(errors) // prompts, 1) * prompts]


def _row(scores: Scores, work: Path, share: float, entry: Entry, errors: list[float]) -> Row:
    exact, pictures = (scores.images(name, "held_out", len(errors)) for name in (REFERENCE, entry.name))
    found = measured(exact, pictures, MODEL, work / "metrics" / f"{scores.key(entry.name)}-{len(errors)}.json")
    values = {"psnr": decibels(errors), **_small(found.per_image)}
    if (shows := captions_shown(scores.prompts("held_out"), pictures)) is not None:
        values["right"] = [float(each) for each in shows]
    return Row(share, entry, values, found.per_set, found.missing, scores.prompts("held_out"))


def _small(per_image: dict[str, list[float]]) -> dict[str, list[float]]:
    """The metrics with 1 - SSIM instead of SSIM, which is so close to 1 that digits would be lost."""
    return {
        ("1 - ssim" if name == "ssim" else name): [1 - value for value in values] if name == "ssim" else values
        for name, values in per_image.items()
    }


def _section(share: float, rows: list[Row], reference: int) -> list[str]:
    """The Markdown section of one size, best rival first."""
    here = sorted((row for row in rows if row.share == share), key=lambda row: -np.mean(row.values["psnr"]))
    if not here:
        return []
    metrics, totals = list(here[0].values), list(here[0].totals)
    heads = ["rival", "bytes", "of FP16", "counted", "assignment", *metrics, *totals, "psnr - best", "setting", "n"]
    title = f"### {share:.0%} of FP16, {int(share * reference):,} bytes"
    lines = [title, "", _line(heads), _line(["---"] * len(heads))]
    for row in here:
        size = [f"{row.entry.nbytes:,}", f"{row.entry.nbytes / reference:.1%}", row.entry.counted, row.entry.assignment]
        cells = [_shown(row.with_interval(name)) for name in metrics]
        cells += [f"{row.totals[name]:.3g}" for name in totals]
        lines.append(
            _line([row.entry.family, *size, *cells, _shown(row.behind(here[0])), row.entry.name, str(row.images)])
        )
    return [*lines, ""]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: tuple[float, float, float]) -> str:
    mean, low, high = value
    return f"{mean:.4g} [{low:.4g}, {high:.4g}]"


def _as_json(row: Row, reference: int) -> dict[str, object]:
    means = {name: row.with_interval(name) for name in row.values}
    size = {"share": row.share, "of_fp16": row.entry.nbytes / reference, "images": row.images}
    per_image = [round(value, 4) for value in row.values["psnr"]]
    return {**vars(row.entry), **size, "mean_low_high": means, **row.totals, "psnr_per_image": per_image}
