"""Progress of a run on stderr: one line for the whole run with the time left, and one for the current stage.

Nothing is drawn if stderr is not a terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from bitpolicy.sensitivity.cost.time_left import TimeLeft

T = TypeVar("T")
_WHOLE = "whole run"


class Stages:
    """Shows stages and records how long each took.

    Attributes:
        seconds: wall-clock seconds of every finished stage, by name.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bars: Progress | None = None
        self._left: TimeLeft | None = None
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    @contextmanager
    def whole_run(self) -> Iterator[None]:
        """While the block runs, a line shows how much of the run is done and how long the rest will take.

        Until `expect` is called, the line only shows that work is under way, and for how long.
        """
        if self._quiet or not sys.stderr.isatty():
            yield
            return
        self._left = None
        with self._drawn(transient=True) as bars:
            bars.add_task(_WHOLE, total=None)
            bars.refresh()  # now, rather than with the next frame
            self._bars = bars
            try:
                yield
            finally:
                self._bars = None

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Set how long each stage of the run will take.

        Args:
            seconds: description of a `bar` -> seconds, in the order of the run.
        """
        self._left = TimeLeft(seconds)
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], total=1.0, completed=0.0)

    @contextmanager
    def bar(self, total: int, description: str) -> Iterator[Callable[[], None]]:
        """A progress bar. The block receives a function, and calls it once for each finished item."""
        if self._quiet or not sys.stderr.isatty() or not total:
            yield lambda: None
            return
        if self._bars is None:
            with self._drawn() as bars:
                task = bars.add_task(description, total=total)
                yield lambda: bars.advance(task)
            return
        yield from self._below_whole_run(self._bars, total, description)

    def _below_whole_run(self, bars: Progress, total: int, description: str) -> Iterator[Callable[[], None]]:
        """The bar of a stage, below the line of the whole run."""
        task, finished = bars.add_task(description, total=total), 0
        if self._left is not None:
            self._left.begin(description)

        def advance() -> None:
            nonlocal finished
            finished += 1
            bars.advance(task)
            if self._left is not None:
                self._left.reached(finished / total)
                bars.update(bars.task_ids[0], completed=self._left.share)

        try:
            yield advance
        finally:
            bars.remove_task(task)
        if self._left is not None:
            self._left.end()
            bars.update(bars.task_ids[0], completed=self._left.share)

    def _drawn(self, transient: bool = False) -> Progress:
        return Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(),
            _Done(),
            TimeElapsedColumn(),
            _Left(lambda: self._left),
            console=Console(stderr=True),
            redirect_stdout=False,
            transient=transient,
        )

    def warn(self, text: str) -> None:
        """Print one line on stderr, with or without bars."""
        print(f"warning: {text}", file=sys.stderr)

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Pass `items` through a progress bar."""
        with self.bar(len(items), description) as advance:
            for item in items:
                yield item
                advance()


class _Done(ProgressColumn):
    """How much is done: the items of a stage, or the percentage of the whole run."""

    def render(self, task: Task) -> Text:
        if task.description != _WHOLE:
            return MofNCompleteColumn().render(task)
        return Text("" if task.total is None else f"{task.percentage:.0f}%", style="progress.percentage")


class _Left(ProgressColumn):
    """The time left: from the forecast for the whole run, from the pace of its items for a stage."""

    max_refresh = 0.5

    def __init__(self, left: Callable[[], TimeLeft | None]) -> None:
        super().__init__()
        self._of_run = left
        self._of_stage = TimeRemainingColumn()

    def render(self, task: Task) -> Text:
        if task.description != _WHOLE:
            return Text("left ").append_text(self._of_stage.render(task))
        left = self._of_run()
        return Text("getting ready" if left is None else f"about {in_words(left.seconds)} left")


def in_words(seconds: float) -> str:
    """A duration for people: "40 s", "6 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
