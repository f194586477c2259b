"""Each rival's best setting under each budget, found on the search samples: never on those it is measured by.

Where there are many settings, single calls of the denoiser at four timesteps of the calibration trajectories say which
few are worth drawing images with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from peers.entry import SHARES, Entry
from peers.scoring import Scores, decibels

LOOK, FINALISTS = 4, 2  # images, of as many search prompts, for how many of the settings whose calls did best


def fitting(entries: Iterable[Entry], share: float, reference: int) -> list[Entry]:
    """The entries that a budget of `share` of `reference` bytes allows and that were not made for another budget."""
    return [entry for entry in entries if entry.nbytes <= share * reference and entry.share in (None, share)]


def select(
    entries: list[Entry], scores: Scores, reference: int, say: Callable[[str], None]
) -> dict[str, dict[str, str]]:
    """Family -> share -> name of the best entry that fits; shares that no setting fits are left out."""
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
    """Over search samples, dB."""
    values = decibels(scores.errors(entry.name, "search", images))
    return sum(values) / len(values)


def write_selection(path: Path, chosen: dict[str, dict[str, str]]) -> None:
    path.write_text(json.dumps(chosen, indent=1) + "\n")


def read_selection(path: Path) -> dict[str, dict[str, str]]:
    return json.loads(path.read_text()) if path.is_file() else {}
