"""The plots of the comparison, drawn from its Markdown tables: one of six families, one of all.

python scripts/bench_peers.py plot --output docs/peers      reads docs/peers.md; writes docs/peers.png, peers-all.png
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

MAIN = {  # the families of the first plot: ours, the best and the best-known tools, and a manual policy
    "bitpolicy, all formats": ("o-", "#0072B2", 2.6),
    "bitpolicy, int4 int8 fp16": ("o-", "#56B4E9", 2.6),
    "modelopt": ("s--", "#D55E00", 1.6),
    "by hand": ("^:", "#CC79A7", 1.6),
    "GGUF": ("s--", "#009E73", 1.6),
    "SDNQ dynamic": ("s--", "#444444", 1.6),
}
_HEADING = re.compile(r"^#+ \d+% of FP16, ")
_VALUE = re.compile(r"^(\S+) \[(\S+), (\S+)\]$")
_LINE = 12.0  # least distance between two names, in points
_LOG = ("1 - ssim", "lpips")  # metrics that start with these approach zero and get a log axis


@dataclass(frozen=True)
class Point:
    """One rival at one size.

    Attributes:
        family: the row of the table.
        setting: its name; the same setting may be the best at several sizes.
        share: bytes, % of FP16.
        metrics: name -> mean and the ends of its interval.
    """

    family: str
    setting: str
    share: float
    metrics: Mapping[str, tuple[float, float, float]]

    @property
    def ours(self) -> bool:
        """Whether bitpolicy made it."""
        return self.family.startswith("bitpolicy")


def read_points(path: Path) -> list[Point]:
    """Every row of the tables in a page."""
    points: list[Point] = []
    inside, heads = False, None
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("#"):
            inside, heads = bool(_HEADING.match(line)), None
        elif inside and cells[0] == "rival":
            heads = cells
        elif heads and line.startswith("|") and not cells[0].startswith("---"):
            points.append(_point(dict(zip(heads, cells, strict=True))))
    return points


def _point(row: dict[str, str]) -> Point:
    found = {head: _VALUE.match(cell) for head, cell in row.items() if head != "psnr - best"}
    metrics = {head: tuple(map(float, match.groups())) for head, match in found.items() if match}
    return Point(row["rival"], row["setting"], float(row["of FP16"].rstrip("%")), metrics)  # type: ignore[arg-type]


def draw_six(points: Sequence[Point], path: Path) -> None:
    """PSNR against size for the families of `MAIN`, each labelled at the end of its line."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 4.6), dpi=150)
    ends = []
    for family, (mark, color, width) in MAIN.items():
        if of_family := _distinct(points, family):
            shares, mean, low, high = _bars(of_family, "psnr")
            axis.errorbar(shares, mean, (low, high), fmt=mark, color=color, lw=width, ms=5, capsize=2)
            ends.append((shares[-1], mean[-1], family, color))
    axis.set(xlabel="bytes of the denoiser, % of FP16", ylabel="PSNR against FP16, dB")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    left, right = axis.get_xlim()
    axis.set_xticks([tick for tick in axis.get_xticks() if left <= tick <= right])
    axis.set_xlim(left, right + 0.36 * (right - left))
    _name_lines(axis, ends)
    figure.tight_layout()
    figure.savefig(path)


def _name_lines(axis: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each name at the end of its line, from the top down, and lower if it would touch the one above."""
    pixels = axis.figure.dpi / 72
    lowest = float("inf")
    for x, y, name, color in sorted(ends, key=lambda end: -end[1]):
        place = axis.transData.transform((x, y))[1] / pixels
        lowest = min(place, lowest - _LINE)
        style = {"color": color, "fontsize": 9, "va": "center", "bbox": {"fc": "white", "ec": "none", "pad": 0.5}}
        axis.annotate(name, (x, y), (10, lowest - place), textcoords="offset points", **style)


def draw_all(points: Sequence[Point], path: Path) -> None:
    """Every family, against every metric that has intervals."""
    pyplot = _pyplot()
    metrics = [name for name in points[0].metrics if name != "ssim"]  # too close to 1 for the tables' precision
    families = list(dict.fromkeys(point.family for point in points))
    colors = dict(zip(families, cycle(pyplot.get_cmap("tab20").colors), strict=False))
    figure, axes = pyplot.subplots(1, len(metrics), figsize=(5.2 * len(metrics), 5.6), dpi=110, squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for family in families:
            of_family = _distinct(points, family)
            shares, mean, low, high = _bars(of_family, metric)
            style = {"fmt": "o-" if of_family[0].ours else "^:", "ms": 4, "lw": 2.4 if of_family[0].ours else 1}
            axis.errorbar(shares, mean, (low, high), label=family, capsize=2, color=colors[family], **style)
        axis.set(xlabel="bytes of the denoiser, % of FP16", title=metric)
        if metric.startswith(_LOG):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=5, loc="lower center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(path)


def _distinct(points: Sequence[Point], family: str) -> list[Point]:
    """One family's points from small to large; a setting that is best at several sizes is one point."""
    found = {point.setting: point for point in points if point.family == family}
    return sorted(found.values(), key=lambda point: point.share)


def _bars(points: Sequence[Point], metric: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Shares, means, and how far the interval reaches below and above."""
    rows = [point.metrics[metric] for point in points]
    shares = [point.share for point in points]
    return shares, [m for m, _, _ in rows], [m - low for m, low, _ in rows], [high - m for m, _, high in rows]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
