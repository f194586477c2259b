"""The lock of a journal file, for a process that may be asleep while it holds it.

Optuna's lock is taken from a process that keeps it for half a minute. If that process was stopped and wakes up, its
`release` finds nothing and raises, which would end a worker that has only slept. What it was about to write is appended
in one piece, so nothing is torn.
"""

from __future__ import annotations

import logging

from optuna.storages.journal import JournalFileSymlinkLock

_log = logging.getLogger(__name__)


class SleepersLock(JournalFileSymlinkLock):
    def release(self) -> None:
        """Give the lock back; one that was taken away meanwhile is nobody's loss."""
        try:
            super().release()
        except RuntimeError:
            _log.info("the lock of the journal was taken away while this process slept")
