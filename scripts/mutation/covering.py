"""Which tests run a line, and how long each takes: measured once with coverage, a test file at a time.

A line run in a fixture of a module or a session counts for every test that uses the fixture. What Python runs when it
imports a module, such as constants and default arguments, no test runs; it is given the tests of the smallest
definition around it, then those of the module, then those of the modules that import it. Lines that tests run only in
other processes are not seen.
"""

from __future__ import annotations

import ast
import os
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from mutation.forked import Message, Send, forked, libraries, run_pytest

_SILENT = 300.0  # seconds that one test may take while it is measured
_QUICK = 0.3  # CPU seconds
Lines = dict[str, dict[str, list[int]]]
"""File, then test, then the lines it runs; the test "" stands for the import."""


@dataclass
class Measured:
    """What one run of a test file told.

    Attributes:
        seconds: CPU time of each test that passed.
        lines: the lines that each test runs.
        libraries: the modules outside the tree that were imported.
        stopped: whether the time limit kept some tests from running.
    """

    seconds: dict[str, float]
    lines: Lines
    libraries: list[str]
    stopped: bool


def measure(root: Path, test_file: str, folders: Sequence[str], limit: float) -> Measured:
    """Run a test file under coverage, until its tests have taken `limit` seconds of CPU time.

    Raises:
        RuntimeError: the file cannot be run, or a test hangs.
    """

    def work(send: Send) -> None:
        recorder = _Recorder(root, folders, limit)
        run_pytest(root, [test_file], recorder)
        send({"measured": recorder.result()})

    *_, last = messages = list(forked(work, wait=_SILENT + limit))
    found = [message["measured"] for message in messages if "measured" in message]
    if not found:
        raise RuntimeError(f"{test_file} cannot be measured: {last['end']}")
    return Measured(**found[0])


class _Recorder:
    """A pytest plugin that switches coverage's context with each test and each shared fixture."""

    def __init__(self, root: Path, folders: Sequence[str], limit: float) -> None:
        from coverage import Coverage

        self._root, self._limit = root, limit
        include = [str(root / folder / "*") for folder in folders]
        self._coverage = Coverage(data_file=None, config_file=False, include=include, messages=False)
        self._context = ""
        self._shared: dict[str, list[str]] = {}
        self._passed: dict[str, float] = {}
        self._failed: set[str] = set()
        self._stopped = False
        self._coverage.start()

    def _switch(self, context: str) -> str:
        before, self._context = self._context, context
        self._coverage.switch_context(context)
        return before

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Every test function once, then once more with its next parameters: the time may not suffice for all."""
        seen: Counter[str] = Counter()
        turns = {}
        for item in items:
            function = item.nodeid.partition("[")[0]
            turns[item.nodeid] = seen[function]
            seen[function] += 1
        items.sort(key=lambda item: turns[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        before, start = self._switch(item.nodeid), _cpu_seconds()
        result = yield
        self._passed[item.nodeid] = _cpu_seconds() - start
        self._switch(before)
        if sum(self._passed.values()) > self._limit and item is not item.session.items[-1]:
            item.session.shouldstop = "the time limit"
            self._stopped = True
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        name = f"fixture {len(self._shared)}"
        self._shared[name] = [i.nodeid for i in request.session.items if _uses(i, fixturedef)]
        before = self._switch(name)
        try:
            return (yield)
        finally:
            self._switch(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self._failed.add(report.nodeid)

    def result(self) -> Message:
        self._coverage.stop()
        data = self._coverage.get_data()
        seconds = {test: round(s, 4) for test, s in self._passed.items() if test not in self._failed}
        lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for path in data.measured_files():
            file = Path(path).relative_to(self._root).as_posix()
            for line, contexts in data.contexts_by_lineno(path).items():
                for test in {t for context in contexts for t in self._shared.get(context, [context])}:
                    if test in seconds or not test:
                        lines[file][test].add(line)
        sorted_lines = {file: {test: sorted(ran) for test, ran in tests.items()} for file, tests in lines.items()}
        return {
            "seconds": seconds,
            "lines": sorted_lines,
            "libraries": libraries(self._root),
            "stopped": self._stopped,
        }


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def _uses(item: Any, fixturedef: Any) -> bool:
    found = getattr(item, "_fixtureinfo", None)
    return found is not None and fixturedef in found.name2fixturedefs.get(fixturedef.argname, ())


@dataclass
class Covering:
    """The tests that run a line.

    Attributes:
        seconds: CPU time of each test.
        lines: file, then line, then the tests that run it, with "" for the import.
    """

    root: Path
    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))

    def add(self, measured: Measured, slowest: float) -> None:
        """Take in what a run of a test file told, without the tests that take more than `slowest` seconds."""
        quick = {test: seconds for test, seconds in measured.seconds.items() if seconds <= slowest}
        self.seconds |= quick
        for file, tests in measured.lines.items():
            for test in tests.keys() & {"", *quick}:
                for line in tests[test]:
                    self.lines[file][line].add(test)

    def tests(self, file: str, line: int) -> list[str]:
        """The tests that run the statement at a line, the fastest first, those of one test file together."""
        text = (self.root / file).read_text(encoding="utf-8")
        around = sorted((block for block in _blocks(text) if line in block.lines), key=lambda block: len(block.lines))
        statement = next((block.header for block in around if line in block.header), range(line, line + 1))
        found = [self._tests_of(file, statement)]
        if "" in found[0] or not any(block.function and line not in block.header for block in around):
            found += [self._tests_of(file, block.lines) for block in around if block.definition]
            found.append(self._tests_of(file, self.lines[file]))
            found.append({test for other in self._importers(file) for test in self._tests_of(other, self.lines[other])})
        chosen: dict[str, None] = {}
        for tests in found:
            chosen |= dict.fromkeys(self._fastest_first(tests - chosen.keys()))
        return list(chosen)

    def _tests_of(self, file: str, lines: Iterable[int]) -> set[str]:
        known = self.lines[file]
        return {test for line in lines if line in known for test in known[line]}

    def _importers(self, file: str) -> list[str]:
        line = f"from {module_name(file)} import "
        return [other for other in self.lines if line in (self.root / other).read_text(encoding="utf-8")]

    def _fastest_first(self, tests: Iterable[str]) -> list[str]:
        """Quick tests of every file before slow ones of any: those check one thing, where slow ones run everything."""
        groups: dict[tuple[bool, str], list[str]] = defaultdict(list)
        for test in sorted(set(tests) - {""}, key=lambda t: (self.seconds[t], t)):
            groups[self.seconds[test] > _QUICK, test.partition("::")[0]].append(test)
        in_order = sorted(groups.items(), key=lambda item: (item[0][0], sum(self.seconds[t] for t in item[1])))
        return [test for _, group in in_order for test in group]


def module_name(file: str) -> str:
    """`search/hull.py` is imported as bitpolicy.search.hull."""
    parts = Path(file).with_suffix("").parts
    return ".".join(parts if parts[0] == "bitpolicy" else ("bitpolicy", *parts))


@dataclass(frozen=True)
class _Block:
    """A statement or a clause: all its lines, and those before the first statement in it."""

    lines: range
    header: range
    function: bool
    definition: bool


@lru_cache(maxsize=4)
def _blocks(text: str) -> list[_Block]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):
            body = getattr(node, "body", None)
            first, last = _lines_of(node)
            header = range(first, max(_lines_of(body[0])[0], first + 1)) if body else range(first, last + 1)
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            found.append(_Block(range(first, last + 1), header, function, function or isinstance(node, ast.ClassDef)))
    return found


def _lines_of(node: ast.AST) -> tuple[int, int]:
    """First and last line, decorators included."""
    parts = [part for part in ast.walk(node) if hasattr(part, "lineno")]
    return min(part.lineno for part in parts), max(part.end_lineno for part in parts)
