"""Tests bitpolicy's guarantees under damaged files, kills, full disks and concurrent processes.

    python scripts/torture.py                                  10,000 damaged files, 60 kills, 60 full disks, 60 pairs
    python scripts/torture.py --only files --cases 500         some of the parts files,kills,disks,pairs, with commas
    python scripts/torture.py --json torture.json              counts and every bad case; the next run resumes from it
    python scripts/torture.py --case 1234                      one damaged file, with all details

There are four parts. files: a file that bitpolicy wrote is damaged, then used as a user would use it. kills: a search,
a probe or an export is killed at random moments, and must end with the bytes of an undisturbed run. disks: the disk is
full after some number of pages, then it grows. pairs: two processes work in one folder.

Allowed outcomes are: refused (one BitPolicyError, or exit code 2 with one line); same values (the damage did no harm);
differs knowingly (the policy.yaml is another valid one, read exactly as written); refused by diffusers
(from_pretrained, with its own error); memory (stopped by a limit of 3 GiB). Forbidden are: other values, hang, crash,
raw exception. The exit code is 1 if one of those occurred. Ctrl-C prints the table so far.

--seed and its number determine a case completely. Nothing is written outside a temporary folder, unless --work or
--json name a place.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ordeals.artefacts import Artefacts, make
from ordeals.commands import warm_up
from ordeals.files import Files
from ordeals.judge import Verdict
from ordeals.tally import Progress, Tally

PARTS = ("files", "kills", "disks", "pairs")
Result = tuple[str, Verdict, dict[str, Any]]
"""A row of the table, the verdict, and what is needed to repeat the case."""


def files(made: Artefacts, args: argparse.Namespace, first: int) -> Iterator[Result]:
    for case in Files(made, args.seed, made.work / "cases").cases(first, args.cases):
        about = {"seed": args.seed, "case": case.number, "file": case.file, "damage": case.done}
        yield case.row, case.verdict, {**about, "operation": case.operation}


def kills(made: Artefacts, args: argparse.Namespace, first: int) -> Iterator[Result]:
    from ordeals.kills import Kills

    yield from Kills(made, args.seed).rounds(first, args.kills)


def disks(made: Artefacts, args: argparse.Namespace, first: int) -> Iterator[Result]:
    from ordeals.disks import Disks

    yield from Disks(made, args.seed).rounds(first, args.disks)


def pairs(made: Artefacts, args: argparse.Namespace, first: int) -> Iterator[Result]:
    from ordeals.pairs import Pairs

    yield from Pairs(made, args.seed).rounds(first, args.pairs)


def run(args: argparse.Namespace, made: Artefacts, tally: Tally) -> None:
    """Run every requested part, each from where a stopped run left it."""
    parts: dict[str, tuple[Callable[..., Iterator[Result]], int]] = {
        "files": (files, args.cases),
        "kills": (kills, args.kills),
        "disks": (disks, args.disks),
        "pairs": (pairs, args.pairs),
    }
    progress = Progress(tally, args.json, args.quiet)
    try:
        for part in args.only:
            act, count = parts[part]
            first, since = tally.done.get(part, 0), time.monotonic()
            for row, verdict, about in act(made, args, first):
                tally.add(part, row, verdict, about)
                progress.step(part, tally.done[part], count, since, first)
    finally:
        progress.save()


def one(args: argparse.Namespace, made: Artefacts) -> int:
    """Run one case of a damaged file and print its details."""
    case = Files(made, args.seed, made.work / "cases").case(args.case)
    print(f"case {case.number} of seed {args.seed}: {case.row}, {case.file}: {case.done}; then {case.operation}")
    print(f"{case.verdict.outcome}\n{case.verdict.detail}")
    return int(case.verdict.forbidden)


def _parts(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [part for part in found if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a part; write some of {','.join(PARTS)}")
    return found


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random draws (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=10_000, help="number of damaged files")
    parser.add_argument("--kills", type=int, default=60, help="number of SIGKILLs")
    parser.add_argument("--disks", type=int, default=60, help="number of full disks; needs root for a small tmpfs")
    parser.add_argument("--pairs", type=int, default=60, help="number of rounds of two processes in one folder")
    parser.add_argument(
        "--only", type=_parts, default=list(PARTS), metavar="PARTS", help="some of files,kills,disks,pairs"
    )
    parser.add_argument("--case", type=int, metavar="N", help="run only damaged file number N and print its details")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write counts and bad cases here; a stopped run resumes from it"
    )
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep the artefacts here for the next run")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parsed(arguments)
    warm_up()
    with tempfile.TemporaryDirectory(prefix="torture-") as own:
        work = (args.work or Path(own)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        made = make(work)
        if args.case is not None:
            return one(args, made)
        tally = Tally.load(args.json, args.seed) if args.json else Tally(args.seed)
        try:
            run(args, made, tally)
        except KeyboardInterrupt:
            tally.notes.append("Stopped early by Ctrl-C.")
        print(tally.table())
        for case in tally.bad[:20]:
            print(
                f"{case['outcome']}: {', '.join(f'{k} {v}' for k, v in case.items() if k not in ('outcome', 'detail'))}"
            )
        return int(tally.failed)


if __name__ == "__main__":
    sys.exit(main())
