"""Write docs/pipelines.md: every pipeline class that the installed diffusers exports, and what bitpolicy does with it.

    python scripts/pipelines_table.py                run what is not yet known, then write the page
    python scripts/pipelines_table.py --only Flux    run the classes whose name contains Flux, known or not
    python scripts/pipelines_table.py --again        run all of them

Each class is built at toy size (tests/toys/) and taken through the stages of tests/toys/stages.py in a process of its
own. Outcomes are kept in --known, so that a stopped run continues. A class that diffusers adds appears as `no toy yet`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "pipelines.md"
sys.path.insert(0, str(ROOT / "tests" / "toys"))
_LIMIT = 600  # seconds for one class
_NO_TOY = "no toy yet"
INTRO = """\
# Pipeline classes

Every pipeline class that diffusers {version} exports, at toy size: real classes and random weights, on a CPU.
`python scripts/pipelines_table.py` writes this page. `pytest -m every_pipeline` runs the same stages.

| stage | what is checked |
|---|---|
{stages}

A cell is `pass`, or the line with which bitpolicy refuses the class. Stages after a refusal are not run.

{counts}

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="run the classes whose name contains one of these")
    parser.add_argument("--again", action="store_true", help="run all classes, known or not")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, with one thread each")
    parser.add_argument("--known", type=Path, default=ROOT / "build" / "pipelines.json", help="file of the outcomes")
    args = parser.parse_args()
    from toy_pipelines import EVERY

    known: dict[str, dict[str, str]] = json.loads(args.known.read_text()) if args.known.is_file() else {}
    missing = [name for name in EVERY if args.again or name not in known]
    wanted = [name for name in EVERY if any(part in name for part in args.only)] if args.only else missing
    args.known.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")  # whose processes have everything imported
    context.set_forkserver_preload(["stages", "toy_pipelines"])
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, found in zip(wanted, pool.map(partial(outcomes, context), wanted), strict=True):
            known[name] = found
            args.known.write_text(json.dumps(known, indent=1), encoding="utf-8")
            print(name, found, flush=True)
    PAGE.write_text(page({name: known[name] for name in EVERY if name in known}), encoding="utf-8")


def outcomes(context: Any, name: str) -> dict[str, str]:
    """The outcome of each stage for one toy, run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_run, args=(name, Path(folder)))
        process.start()
        process.join(_LIMIT)
        if process.is_alive():
            process.kill()
            return {"layers": f"FAILED: more than {_LIMIT} seconds"}
        written = Path(folder) / "outcomes.json"
        if not written.is_file():
            return {"layers": f"FAILED: the process ended with {process.exitcode}"}
        found: dict[str, str] = json.loads(written.read_text())
        return found


def _run(name: str, folder: Path) -> None:
    """Take one toy through the stages, silently, and write their outcomes."""
    import stages
    import torch
    from toy_pipelines import EVERY

    torch.set_num_threads(1)
    with (folder / "output").open("w") as output, redirect_stdout(output), redirect_stderr(output):
        try:
            found = stages.run(EVERY[name], folder)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs into the table
            found = {"layers": " ".join(["FAILED:", type(error).__name__, *str(error).split(), *error.__notes__])}
    (folder / "outcomes.json").write_text(json.dumps(found))


def exported() -> Iterator[str]:
    """The names of all pipeline classes of the installed diffusers, modular ones included."""
    import diffusers

    bases = (diffusers.DiffusionPipeline, diffusers.ModularPipeline)
    for name in sorted(dir(diffusers)):
        found: Any = getattr(diffusers, name)
        if inspect.isclass(found) and issubclass(found, bases) and found not in bases:
            yield name


def page(known: dict[str, dict[str, str]]) -> str:
    import diffusers
    import stages

    rows, counts = [], Counter[str]()
    for name in exported():
        forms = [toy for toy in known if toy == name or toy.startswith(f"{name}-")]
        if not forms:
            counts[_NO_TOY] += 1
            rows.append(f"| `{name}` | {_NO_TOY} |" + " |" * (len(stages.STAGES) - 1))
        for form in forms:
            found = known[form]
            counts["pass" if set(found.values()) == {stages.PASS} else "refused"] += 1
            cells = [found.get(stage, "").replace("|", "\\|").replace("\n", " ") for stage in stages.STAGES]
            rows.append(f"| `{form}` | " + " | ".join(cells) + " |")
    head = INTRO.format(
        version=diffusers.__version__,
        stages="\n".join(f"| {name} | {stage.__doc__} |" for name, stage in stages.STAGES.items()),
        counts=", ".join(f"{count} {what}" for what, count in counts.items()) + ".",
    )
    titles = ["class", *stages.STAGES]
    return head + "\n".join(["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|", *rows, ""])


if __name__ == "__main__":
    main()
