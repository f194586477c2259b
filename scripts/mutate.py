"""Changes the code at random places and counts the changes that no test notices.

    python scripts/mutate.py                            300 mutants of sensitivity/, search/ and kernels/formats/
    python scripts/mutate.py --stop-after 480           begin no further mutant after 480 seconds; repeat to continue
    python scripts/mutate.py --show survived            print the changes that survived, with their numbers
    python scripts/mutate.py --mutant 17 tests/search   run tests of your choice on mutant 17

A mutant is the code with one small change: another operator, `and` for `or`, another number, a loop that is skipped.
The changes are cosmic-ray's. The first run measures, file by file, which tests run which line and how long each test
takes. A mutant then gets the tests that run its line, the fastest first, until one fails.

The outcomes are: killed (a test failed), timeout (a test hung), not covered (no test runs the line), survived. A
survivor is a gap in the tests, a change that does not alter what the code computes, or code that nothing needs.
--limit bounds the CPU time of a mutant; a survivor that reached it is reported with the number of tests that ran.

Everything that is known so far is in --work, so a stopped or killed run continues when it is repeated. Delete the
folder to measure the tests again. The tree itself is never changed. This needs Linux, and two packages:
pip install cosmic-ray coverage
"""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib.util
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mutation.covering import Covering, measure
from mutation.forked import preload
from mutation.mutants import Mutant
from mutation.trial import Outcome, trial, trial_of_files
from mutation.work import Work

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sensitivity", "search", "kernels/formats")
TESTS = (
    "tests/sensitivity",
    "tests/search",
    *(f"tests/kernels/test_{name}.py" for name in ("every_format", "formats", "convrot", "properties", "row_chunks")),
    *(f"tests/kernels/test_{name}.py" for name in ("storage_layout", "quantizers")),
    *(f"tests/pipelines/test_{name}.py" for name in ("calls", "inputs")),
)
_IN_OTHER_PROCESSES = ("test_grpc.py", "test_postgresql.py", "test_workers.py")
_OF_OPTUNA = "test_optuna_cases.py"  # cases of Optuna's own suite, which say little about the code here
_SLOWEST = 10.0  # CPU seconds: a slower test is run for no mutant


def test_files(root: Path, tests: Sequence[str]) -> list[str]:
    """The files of some folders and files of tests, relative to `root`."""
    found: list[str] = []
    for test in tests:
        path = root / test
        if not path.exists():
            raise SystemExit(f"there is no {test}; name folders and files of tests, relative to {root}")
        found += [p.relative_to(root).as_posix() for p in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])]
    return [file for file in found if not file.endswith((*_IN_OTHER_PROCESSES, _OF_OPTUNA))]


def covering(work: Work, args: argparse.Namespace, until: float) -> Covering | None:
    """The tests of every line, measured where they are not yet; None if the time is up before that."""
    known = Covering(work.root)
    files = test_files(work.root, args.tests)
    before = {file: found for file in files if (found := work.measured(file))}
    for found in before.values():
        known.add(found, _SLOWEST)
        preload(found.libraries)
    gc.freeze()  # a collection in a child would copy every page
    for place, file in enumerate(files):
        if file not in before:
            if time.monotonic() > until:
                return None
            start = time.monotonic()
            found = measure(work.root, file, args.folders, args.measure)
            work.keep_measured(file, found)
            known.add(found, _SLOWEST)
            preload(found.libraries)
            print(
                f"{place + 1}/{len(files)} {file}: {len(found.seconds)} tests, {sum(found.seconds.values()):.0f} s CPU"
                f"{', stopped at the limit' if found.stopped else ''}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
    return known


def check(root: Path, known: Covering) -> None:
    """Run the quickest test of each file on the code as it is.

    Raises:
        SystemExit: one of them fails, so that it would kill every mutant.
    """
    quickest = {test.partition("::")[0]: test for test in sorted(known.seconds, key=lambda t: -known.seconds[t])}
    file = min(known.lines)
    tests = {test: known.seconds[test] for test in quickest.values()}
    outcome = trial(root, file, (root / file).read_text(encoding="utf-8"), tests, float("inf"))
    if outcome.status != "survived":
        raise SystemExit(f"{outcome.by} fails on the code as it is: {outcome.why}; correct that first")


def tried(work: Work, mutants: list[Mutant], known: Covering, limit: float, until: float) -> Iterator[str]:
    """Try the mutants that have no outcome yet, and say what became of each."""
    results = work.results()
    for mutant in mutants:
        if mutant.key in results:
            continue
        if time.monotonic() > until:
            return
        start = time.monotonic()
        tests = {test: known.seconds[test] for test in known.tests(mutant.file, mutant.line)}
        outcome = trial(work.root, mutant.file, mutant.source(work.root), tests, limit)
        work.add(mutant, outcome, time.monotonic() - start)
        yield f"{mutant.number} {mutant.file}:{mutant.line} {described(outcome)} ({time.monotonic() - start:.1f} s)"


def described(outcome: Outcome) -> str:
    if outcome.status == "survived":
        return f"survived {outcome.ran} tests" + (
            f", time limit, {outcome.ran} of {outcome.of} tests run" if outcome.ran < outcome.of else ""
        )
    return f"{outcome.status}{' by ' + outcome.by if outcome.by else ''}"


def difference(root: Path, mutant: Mutant) -> str:
    before = (root / mutant.file).read_text(encoding="utf-8").splitlines()
    lines = difflib.unified_diff(before, mutant.source(root).splitlines(), n=2, lineterm="")
    return "\n".join(list(lines)[2:])


def table(mutants: list[Mutant], results: dict[Any, Outcome]) -> str:
    found = [results[mutant.key] for mutant in mutants if mutant.key in results]
    counts = Counter(outcome.status for outcome in found)
    unfinished = sum(outcome.status == "survived" and outcome.ran < outcome.of for outcome in found)
    rows = [f"{len(found)} of {len(mutants)} mutants tried"]
    rows += [f"{counts[status]:5} {status}" for status in ("killed", "timeout", "survived", "not covered")]
    rows[3] += f", {unfinished} of them at the time limit"
    return "\n".join(rows)


def one(root: Path, mutant: Mutant, tests: Sequence[str], limit: float) -> int:
    """Run the tests named on one mutant. The exit code is 1 if it survives."""
    print(f"{mutant.file}:{mutant.line}\n{difference(root, mutant)}", flush=True)
    outcome = trial_of_files(root, mutant.file, mutant.source(root), tests, limit)
    print(f"{described(outcome)} {outcome.why}".rstrip())
    return int(outcome.status == "survived")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=list(TESTS), help="folders and files of tests; default: see TESTS")
    parser.add_argument("--count", type=int, default=300, help="number of mutants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: %(default)s)")
    parser.add_argument(
        "--folders", type=lambda text: text.split(","), default=list(FOLDERS), help="the code to change, with commas"
    )
    parser.add_argument("--limit", type=float, default=60.0, help="CPU seconds for each mutant (default: %(default)s)")
    parser.add_argument(
        "--measure", type=float, default=60.0, help="CPU seconds for measuring each test file (default: %(default)s)"
    )
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing later")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="default: build/mutation")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to change; default: this one")
    parser.add_argument("--show", metavar="STATUS", help="print the mutants of one outcome, and run nothing")
    parser.add_argument("--mutant", type=int, metavar="N", help="run the tests named on mutant N, and record nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parsed(arguments)
    until = time.monotonic() + args.stop_after
    if missing := [name for name in ("cosmic_ray", "coverage") if importlib.util.find_spec(name) is None]:
        print(f"{' and '.join(missing)} cannot be imported; pip install cosmic-ray coverage", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child is killed as well
    work = Work(args.root, (args.work or args.root / "build" / "mutation").resolve())
    mutants = work.drawn(args.folders, args.count, args.seed)
    if args.mutant is not None:
        return one(args.root, mutants[args.mutant], args.tests, args.limit)
    if args.show is None and (known := covering(work, args, until)):
        if not work.results():
            check(args.root, known)
        for line in tried(work, mutants, known, args.limit, until):
            print(line, flush=True)
    results = work.results()
    for mutant in mutants if args.show else ():
        outcome = results.get(mutant.key)
        if outcome and outcome.status == args.show:
            print(
                f"{mutant.number} {mutant.file}:{mutant.line} {described(outcome)}\n{difference(args.root, mutant)}\n"
            )
    print(table(mutants, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
