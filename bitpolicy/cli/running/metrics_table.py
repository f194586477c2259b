"""The table of image quality: a row per metric, and below it what could not be measured and how to enable it."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from bitpolicy.search.quality.metrics import Result, Sets
from bitpolicy.search.quality.psnr import Paired, Unavailable

_ARROWS = {"higher": "↑", "lower": "↓"}
_REFERENCE = "  reference's own"


def print_metrics(results: Mapping[str, Result], images: int) -> None:
    """Print what `measure` found over `images` images. An arrow shows which direction is better."""
    console = Console()
    title = f"{images} images, checkpoint against reference"
    table = Table(title=title, title_justify="left")
    for column in ("metric", "value", "95% interval", "worst"):
        table.add_column(column, no_wrap=True)
    table.add_column("network", overflow="fold")
    for name, found in results.items():
        for row in _rows(name, found):
            table.add_row(*row)
    console.print(table)
    for name, found in results.items():
        if isinstance(found, Unavailable):
            console.print(f"{name}: {found.reason}; {found.remedy}", soft_wrap=True, highlight=False, markup=False)


def _rows(name: str, found: Result) -> list[tuple[str, ...]]:
    if isinstance(found, Paired):
        return _paired(found)
    return _sets(found) if isinstance(found, Sets) else [(name, "unavailable")]


def _paired(found: Paired) -> list[tuple[str, ...]]:
    """One row, and another if the reference has a value of its own."""
    name, network = f"{found.name} {_ARROWS[found.better]}", found.network or ""
    if found.mean is None or found.worst is None:
        return [(name, "all identical", "", "", network)]
    unit = f" {found.unit}" if found.unit else ""
    interval = "" if found.interval is None else " to ".join(map(_short, found.interval))
    rows: list[tuple[str, ...]] = [(name, f"{found.mean:.5g}{unit}", interval, _short(found.worst) + unit, network)]
    if found.of_reference is not None:
        rows.append((_REFERENCE, f"{found.of_reference:.5g}"))
    return rows


def _sets(found: Sets) -> list[tuple[str, ...]]:
    """One row, and two more if there is a folder of real images."""
    rows: list[tuple[str, ...]] = [(f"{found.name} ↓", f"{found.to_reference:.5g}", "", "", found.network)]
    if found.to_real is not None and found.reference_to_real is not None:
        rows.append((f"  to {found.n_real} real", f"{found.to_real:.5g}"))
        rows.append((_REFERENCE, f"{found.reference_to_real:.5g}"))
    return rows


def _short(value: float) -> str:
    """Three digits; five just below 1, where SSIM values are."""
    return f"{value:.5f}" if 0.9 < value < 1 else f"{value:.3g}"
