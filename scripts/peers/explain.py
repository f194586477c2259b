"""Why assignments of the same formats differ in quality: the prediction and the measurement of each.

For each policy z, in dB behind the adjoint's additive optimum at the same bytes (negative is better):

    additive   10 log10 A(z) / A(z*),  A = sum_l e(l, z_l), the adjoint's estimate on the calibration samples
    ablation   the same sum, with errors measured on whole trajectories
    vectors    10 log10 Q(z) / Q(z*),  Q = mean_r (sum_l s_r(l, z_l))^2: how the layers' errors add up, with a standard
               error over samples (jackknife); it is large because there are few sketches
    measured   paired difference of the PSNR of held-out images, with its interval over prompts

If additive and measured differ by more than the interval, either interactions between layers decide or the estimate is
noisy. If additive is about zero, there was nothing to choose. `spread` is the standard deviation of the measured
difference over prompts: how much a single prompt can change it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peers.entry import SHARES, Entry, read_entries
from peers.noise import noise_lines
from peers.rivals import Rivals
from peers.scoring import Scores, decibels
from peers.table import interval

from bitpolicy.kernels.formats.format import Format
from bitpolicy.sensitivity.table import SensitivityTable

BEST = "adjoint-additive"
_HEADS = ("of FP16", "assignment", "layers that differ", "additive", "ablation", "vectors", "measured", "spread", "n")


@dataclass(frozen=True)
class Explainer:
    """Compares predictions with measurements.

    Attributes:
        rivals: has the adjoint probe's table.
        truth: a table measured on whole trajectories.
        scores: the errors of the images.
        images: the most images of each entry to use.
    """

    rivals: Rivals
    truth: SensitivityTable
    scores: Scores
    images: int

    def lines(self) -> list[str]:
        """The table in Markdown."""
        entries = [*read_entries(self.rivals.work / "candidates")]
        rows = [row for share in SHARES for row in self._rows(share, entries)]
        return ["| " + " | ".join(cells) + " |" for cells in (_HEADS, ["---"] * len(_HEADS), *rows)]

    def _rows(self, share: float, entries: Sequence[Entry]) -> list[list[str]]:
        best = f"{BEST}@{share:.2f}"
        known = {e.name: formats for e in entries if e.share == share and (formats := self._policy(e.name))}
        return [self._row(share, name, known[name], best, known[best]) for name in known if name != best]

    def _policy(self, name: str) -> dict[str, Format] | None:
        """The formats of an entry, or None if it was rounded differently or has not been measured."""
        scored = self.scores.errors(name, "held_out", self.images, make=False)
        return self.rivals.assigned(name) if scored and "our-rounding" not in name else None

    def _row(
        self, share: float, name: str, policy: Mapping[str, Format], best: str, optimum: Mapping[str, Format]
    ) -> list[str]:
        behind = [_ratio(self._additive(table, policy), self._additive(table, optimum)) for table in self._tables]
        differ = sum(policy[layer] != optimum[layer] for layer in policy)
        own, other = (decibels(self.scores.errors(n, "held_out", self.images, make=False)) for n in (name, best))
        gaps = [b - a for a, b in zip(own, other, strict=False)]
        prompts = self.scores.prompts("held_out")
        low, high = interval(gaps, prompts)
        by_prompt = [
            np.mean([g for g, q in zip(gaps, prompts, strict=False) if q == p]) for p in {*prompts[: len(gaps)]}
        ]
        vectors, wrong = self._vectors(policy, optimum)
        shown = [*(f"{value:.2f}" for value in behind), f"{vectors:.2f} ± {wrong:.2f}"]
        shown += [f"{np.mean(gaps):.2f} [{low:.2f}, {high:.2f}]", f"{np.std(by_prompt, ddof=1):.2f}", str(len(gaps))]
        return [f"{share:.0%}", name.partition("@")[0], str(differ), *shown]

    @property
    def _tables(self) -> tuple[SensitivityTable, SensitivityTable]:
        return self.rivals.ours, self.truth

    def _additive(self, table: SensitivityTable, policy: Mapping[str, Format]) -> float:
        return sum(table.score(i, policy[layer]) for i, layer in enumerate(table.layers))

    def _vectors(self, policy: Mapping[str, Format], optimum: Mapping[str, Format]) -> tuple[float, float]:
        """The prediction in dB, and its jackknife standard error over samples."""
        squares = [self._sums(formats).reshape(-1, self.rivals.vectors) ** 2 for formats in (policy, optimum)]
        own, other = (square.mean(1) for square in squares)
        count = len(own)
        left = [_ratio(np.delete(own, i).mean(), np.delete(other, i).mean()) for i in range(count)]
        return _ratio(own.mean(), other.mean()), float(np.std(left) * (count - 1) ** 0.5)

    def _sums(self, policy: Mapping[str, Format]) -> np.ndarray:
        """The sum of a policy's sketches, T_r, shape (R)."""
        table = self.rivals.ours
        assert table.sketches is not None
        packed = [(i, policy[layer]) for i, layer in enumerate(table.layers) if policy[layer].packed]
        return np.sum([table.sketches[:, i, table.formats.index(f)].double().numpy() for i, f in packed], axis=0)


def _ratio(error: float, other: float) -> float:
    return float(10 * np.log10(error / other))


def explain(rivals: Rivals, scores: Scores, images: int, output: Path) -> None:
    """Write and print the table and that of `peers.noise`."""
    text = "\n".join([*Explainer(rivals, rivals.ablated(), scores, images).lines(), "", *noise_lines(rivals)])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\n")
    print(text)
