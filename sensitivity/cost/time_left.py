"""How much of a run is done, and how long the rest will take.

A forecast gives the seconds of each stage. During the run, the stages that ran show how far off the forecast is, and
the rest is scaled accordingly. With e_i the expected seconds and d_i the finished share of stage i, s the seconds spent
in stages and E = sum_i e_i,

    left = sum_i (1 - d_i) e_i * (s + c E) / (sum_i d_i e_i + c E),

where the sums in the quotient cover only what this run did, not what an earlier run had finished. The small constant c
expresses trust in the forecast, so that the first stage does not decide alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

_TRUST = 0.1  # of the expected whole: c above


class TimeLeft:
    """The clock of one run.

    Args:
        expected: stage name -> expected seconds, in the order in which stages run.
        clock: gives seconds that never decrease.
    """

    def __init__(self, expected: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._expected, self._clock = dict(expected), clock
        self._order = list(expected)
        self._done = dict.fromkeys(expected, 0.0)  # share of each stage, 0 to 1
        self._spent = self._ran = 0.0  # seconds spent in stages, and the seconds they were expected to take
        self._stage: str | None = None
        self._since = 0.0

    def begin(self, stage: str) -> None:
        """Start a stage. All stages before it count as done, in this run or an earlier one."""
        self._settle()
        if stage in self._done:
            for earlier in self._order[: self._order.index(stage)]:
                self._done[earlier] = 1.0
        self._stage, self._since = stage, self._clock()

    def reached(self, share: float) -> None:
        """Set the finished share of the current stage, from 0 to 1. A lower one is ignored: a stage may start twice."""
        stage, share = self._stage, min(share, 1.0)
        if stage in self._done and share > self._done[stage]:
            self._ran += (share - self._done[stage]) * self._expected[stage]
            self._done[stage] = share
        self._settle()
        self._since = self._clock()

    def end(self) -> None:
        """End the current stage."""
        self.reached(1.0)
        self._stage = None

    @property
    def share(self) -> float:
        """The finished share of the whole run, by expected seconds, from 0 to 1."""
        whole = sum(self._expected.values())
        return sum(self._done[name] * seconds for name, seconds in self._expected.items()) / whole if whole else 0.0

    @property
    def seconds(self) -> float:
        """How long the rest will take."""
        whole = sum(self._expected.values())
        if not whole:
            return 0.0
        trust = _TRUST * whole
        pace = (self._spent + trust) / (self._ran + trust)
        rest = sum((1 - self._done[name]) * seconds for name, seconds in self._expected.items()) * pace
        under_way = self._clock() - self._since if self._stage in self._done else 0.0
        return max(rest - under_way, 0.0)

    def _settle(self) -> None:
        if self._stage in self._done:
            self._spent += self._clock() - self._since
