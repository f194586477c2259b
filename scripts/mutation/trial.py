"""Runs the tests of one mutant until one fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from mutation.covering import module_name
from mutation.forked import Changed, Send, forked, run_pytest

_START = 30.0  # CPU seconds until the first test starts
_SILENT = 30.0  # CPU seconds that a test may take more than _TIMES its usual time: it may be the one to make a fixture
_TIMES = 5.0
_UNREPORTED = (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR)
_UNKNOWN = 20.0  # CPU seconds of a test that was not measured


@dataclass(frozen=True)
class Outcome:
    """What the tests made of a mutant.

    Attributes:
        status: "killed", "survived", "timeout" or "not covered".
        ran: how many tests ran to their end, of `of`. Fewer, in a survivor, mean that the time limit came first.
        by: the test that failed or hung, or "import" if its module could not be imported.
        why: the last line of the failure.
    """

    status: str
    ran: int = 0
    of: int = 0
    by: str = ""
    why: str = ""


def trial(root: Path, file: str, text: str, tests: Mapping[str, float], limit: float) -> Outcome:
    """Run tests, in order, against the tree `root` with `text` in place of one of its files.

    Args:
        tests: each test's usual CPU seconds.
        limit: CPU seconds after which no further test starts.

    Raises:
        RuntimeError: there is no such test.
    """
    if not tests:
        return Outcome("not covered")
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    if gone := [test_file for test_file in files if not (root / test_file).exists()]:
        raise RuntimeError(f"{gone[0]} is gone; measure the tests again")
    outcome = trial_of_files(root, file, text, list(files), limit, tests)
    if outcome.status == "survived" and outcome.of != len(tests):
        raise RuntimeError(f"{len(tests) - outcome.of} of {len(tests)} tests are gone; measure the tests again")
    return outcome


def trial_of_files(
    root: Path, file: str, text: str, test_files: Sequence[str], limit: float, tests: Mapping[str, float] | None = None
) -> Outcome:
    """The same with test files and folders, of which `tests` chooses some tests and their order; None: all."""

    def work(send: Send) -> None:
        sys.meta_path.insert(0, Changed(module_name(file), root / file, text))
        code = run_pytest(root, test_files, _Trial(tests, limit, send))
        if code in _UNREPORTED:  # a conftest.py that cannot be imported is reported by no hook
            send({"failed": "import", "why": f"pytest's exit code is {code}"})

    ran, of, running = 0, 0, "import"
    for message in forked(work, wait=_START):
        if "chosen" in message:
            of = message["chosen"]
        elif "starts" in message:
            running = message["starts"]
        elif "ran" in message:
            ran += 1
        elif "failed" in message:
            return Outcome("killed", ran, of, message["failed"], message["why"])
        elif message.get("end") == "hang":
            return Outcome("timeout", ran, of, running)
        elif message.get("end") != "done":
            return Outcome("killed", ran, of, running, message["end"].strip().splitlines()[-1])
    return Outcome("survived", ran, of)


class _Trial:
    """A pytest plugin that runs the chosen tests in their order and tells what becomes of them."""

    def __init__(self, tests: Mapping[str, float] | None, limit: float, send: Send) -> None:
        self._tests, self._limit, self._send = tests, limit, send

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self._tests is not None:
            order = {test: place for place, test in enumerate(self._tests)}
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])
        self._send({"chosen": len(items)})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._send({"starts": nodeid, "wait": _SILENT + _TIMES * (self._tests or {}).get(nodeid, _UNKNOWN)})

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._send({"ran": nodeid})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        result = yield
        if sum(os.times()[:4]) > self._limit:
            item.session.shouldstop = "the time limit"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._tell(report.nodeid, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tell("import", report)

    def _tell(self, by: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")] or [""]
        self._send({"failed": by, "why": lines[0][1:].strip()[:200]})
