"""Progress of long stages on stderr, with a bar and an ETA; nothing when it is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


class Stages:
    """Shows stages and remembers how long each took.

    Attributes:
        seconds: wall-clock seconds of every finished stage, by name.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    @contextmanager
    def bar(self, total: int, description: str) -> Iterator[Callable[[], None]]:
        """A progress bar; the block calls what it is given once for each finished item."""
        if self._quiet or not sys.stderr.isatty():
            yield lambda: None
            return
        columns = (
            TextColumn("{task.description:<26}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(description, total=total)
            yield lambda: bars.advance(task)

    def warn(self, text: str) -> None:
        """One line on stderr, bars or none."""
        print(f"warning: {text}", file=sys.stderr)

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Pass `items` through a progress bar."""
        with self.bar(len(items), description) as advance:
            for item in items:
                yield item
                advance()
