"""The verdict on a case: an operation runs in a fork of this process, under limits, and its result is compared.

An operation returns values, name -> text, such as a hash of every tensor. The judge compares them with the values of
the undamaged artefact.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ordeals.commands import alone, read_all
from ordeals.damage import NOBODY

REFUSED, SAME, KNOWN, THEIRS, MEMORY = "refused", "same values", "differs knowingly", "refused by diffusers", "memory"
OTHER, HANG, CRASH, RAW = "other values", "hang", "crash", "raw exception"
ALLOWED, FORBIDDEN = (REFUSED, SAME, KNOWN, THEIRS, MEMORY), (OTHER, HANG, CRASH, RAW)
OUTCOMES = (*ALLOWED, *FORBIDDEN)
MEMORY_LIMIT = 3 * 2**30  # bytes that an operation may use in addition to this process's own
_STARVED = (
    "allocate memory",
    "MemoryError",
    "Cannot allocate",
    "not enough memory",
    "bad_alloc",
    "memory allocation of",
)

Values = Mapping[str, str]


class KnownDifference(Exception):
    """Raised by an operation that has verified independently that its input is valid, only different."""


class Mistake(Exception):
    """Raised by an operation when a command ends with exit code 2 and one line."""


@dataclass(frozen=True)
class Verdict:
    """An outcome and its details."""

    outcome: str
    detail: str = ""

    @property
    def forbidden(self) -> bool:
        return self.outcome in FORBIDDEN


def judged(
    operation: Callable[[], Values], expected: Values | None, patience: float = 30, as_nobody: bool = False
) -> Verdict:
    """Run the operation and compare its values. Without `expected`, the verdict is `SAME` and its detail the values.

    Args:
        patience: seconds after which it counts as hanging.
        as_nobody: run it as a user without access to closed files, if this process is root.
    """
    outlet, inlet = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        os.close(outlet)
        _in_child(operation, inlet, as_nobody)
    os.close(inlet)
    said = read_all(outlet, patience)
    os.close(outlet)
    if said is None:
        _kill(pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if said is None:
        return Verdict(HANG, f"not done after {patience:g} s")
    if not said:
        return Verdict(CRASH, f"it died of signal {-code}" if code < 0 else f"it ended with exit code {code}")
    return _compared(json.loads(said), expected)


def _kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)


def _compared(said: dict[str, object], expected: Values | None) -> Verdict:
    if "outcome" in said:
        return Verdict(str(said["outcome"]), str(said["detail"]))
    found = said["values"]
    assert isinstance(found, dict)
    if expected is None:
        _import(said["imported"])
        return Verdict(SAME, json.dumps(found))
    names = sorted(name for name in {*found, *expected} if _differs(name, found.get(name), expected.get(name)))
    if not names:
        return Verdict(SAME)
    first = f"{expected.get(names[0], 'nothing')[:300]} became {found.get(names[0], 'nothing')[:300]}"
    return Verdict(OTHER, f"{', '.join(names)}: {first}")


def _import(names: object) -> None:
    """Import here what an undamaged case imported in its fork, so that later forks start with it."""
    assert isinstance(names, list)
    for name in names:
        if name.startswith(("diffusers.", "transformers.", "bitpolicy.")):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page


def _differs(name: str, found: str | None, expected: str | None) -> bool:
    """Whether two values differ. Ignores extra entries of a config, which nothing reads."""
    if not name.endswith(" config") or found is None or expected is None:
        return found != expected
    held, wanted = json.loads(found), json.loads(expected)
    return {key: held.get(key) for key in wanted} != wanted


def _in_child(operation: Callable[[], Values], inlet: int, as_nobody: bool) -> None:
    try:
        alone()
        faulthandler.disable()  # the signal already reports a crash
        silent = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silent, descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        _limit()
        if as_nobody and os.geteuid() == 0:
            os.seteuid(NOBODY)
        before = set(sys.modules)
        found = _outcome(operation)
        said = json.dumps({**found, "imported": sorted(sys.modules.keys() - before)}).encode()
        while said:
            said = said[os.write(inlet, said) :]
    finally:
        os._exit(0)


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    held = pages * resource.getpagesize()
    if held:
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_LIMIT, held + MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _outcome(operation: Callable[[], Values]) -> dict[str, object]:
    """The values, or the outcome and its detail."""
    from bitpolicy import BitPolicyError

    try:
        return {"values": dict(operation())}
    except KnownDifference as what:
        return {"outcome": KNOWN, "detail": str(what)}
    except (BitPolicyError, Mistake) as error:
        if any(word in str(error) for word in _STARVED):
            return {"outcome": MEMORY, "detail": str(error)}
        message = str(error).strip()
        return {"outcome": REFUSED if len(message) > 20 else RAW, "detail": message}
    except MemoryError as error:
        return {"outcome": MEMORY, "detail": repr(error)}
    except BaseException as error:  # noqa: BLE001 - any exception is a finding
        text = "".join(traceback.format_exception(error))
        if any(word in str(error) for word in _STARVED):
            return {"outcome": MEMORY, "detail": str(error)}
        return {"outcome": THEIRS if _is_theirs(error) else RAW, "detail": text[-2500:]}


def _is_theirs(error: BaseException) -> bool:
    """Whether diffusers raised the error, called by the operation with none of our code in between."""
    found, frame = [], error.__traceback__
    while frame is not None:
        found.append(frame.tb_frame.f_globals.get("__name__", ""))
        frame = frame.tb_next
    ours = any(name.partition(".")[0] == "bitpolicy" for name in found)
    return not ours and any(name.startswith(("diffusers.", "transformers.")) for name in found)
