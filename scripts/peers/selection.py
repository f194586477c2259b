"""Each rival's best setting under each budget, chosen on the search samples and never on the held-out ones.

If there are several settings, the errors of single denoiser calls at four timesteps of the calibration trajectories
decide which few settings draw images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from peers.entry import SHARES, Entry
from peers.scoring import Scores, decibels

LOOK, FINALISTS = 4, 2  # images, one per search prompt, for this many settings with the best calls


def fitting(entries: Iterable[Entry], share: float, reference: int) -> list[Entry]:
    """The entries that fit into `share` of `reference` bytes and were not made for another budget."""
    return [entry for entry in entries if entry.nbytes <= share * reference and entry.share in (None, share)]


def select(
    entries: list[Entry], scores: Scores, reference: int, say: Callable[[str], None]
) -> dict[str, dict[str, str]]:
    """Family -> share -> name of the best entry that fits; shares without a fitting setting are left out."""
    chosen: dict[str, dict[str, str]] = {}
    for family in sorted({entry.family for entry in entries}):
        own = [entry for entry in entries if entry.family == family]
        for share in SHARES:
            best = _best(fitting(own, share, reference), scores)
            if best is not None:
                chosen.setdefault(family, {})[f"{share:.2f}"] = best.name
                say(f"{family:28} {share:4.0%}  {best.name:48} {best.nbytes / reference:6.1%}")
    return chosen


def _best(entries: list[Entry], scores: Scores) -> Entry | None:
    if len(entries) < 2:
        return next(iter(entries), None)
    finalists = sorted(entries, key=lambda entry: scores.call_error(entry.name))[:FINALISTS]
    return max(finalists, key=lambda entry: mean_psnr(scores, entry, LOOK))


def mean_psnr(scores: Scores, entry: Entry, images: int) -> float:
    """Mean PSNR over search samples, in dB."""
    values = decibels(scores.errors(entry.name, "search", images))
    return sum(values) / len(values)


def write_selection(path: Path, chosen: dict[str, dict[str, str]]) -> None:
    path.write_text(json.dumps(chosen, indent=1) + "\n")


def read_selection(path: Path) -> dict[str, dict[str, str]]:
    return json.loads(path.read_text()) if path.is_file() else {}
