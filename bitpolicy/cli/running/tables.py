"""Print tables in full, however narrow the terminal is. Nobody can look up a layer by half of its name."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

_UNLIMITED = 100_000  # columns


def print_table(table: Table) -> None:
    """Print to stdout. On a terminal, long cells wrap to the next line; elsewhere the table is as wide as it needs to
    be."""
    for column in table.columns:
        column.overflow = "fold"
    console = Console()
    if not sys.stdout.isatty():
        needed = Console(width=_UNLIMITED).measure(table).maximum
        console = Console(width=max(console.width, needed))
    console.print(table)
