"""bitpolicy against other tools and other ways to choose formats: same denoiser, same bytes, same held-out samples.

    python scripts/bench_peers.py prepare                  the samples, and calibration data for tools that need it
    python scripts/bench_peers.py tools [--only sdnq]      each tool's own quantized denoisers
    python scripts/bench_peers.py assignments              other ways to choose among our own three formats
    python scripts/bench_peers.py reround --only 'one-step*'     the same assignments, rounded the way ours are
    python scripts/bench_peers.py add NAME --share 0.33 --checkpoint out/checkpoint    what search-policy exported
    python scripts/bench_peers.py select                   each rival's best setting that fits, on the search samples
    python scripts/bench_peers.py score [--only 'sdnq*'] [--images 256]      images on the held-out samples; resumable
    python scripts/bench_peers.py table [--output docs/peers]                Markdown, JSON and a plot
    python scripts/bench_peers.py plot --output docs/peers     the plots alone, from the Markdown
    python scripts/bench_peers.py picture --only 'b*'      images of the selected entries at one size, and their errors
    python scripts/bench_peers.py explain                  predicted and measured error of each assignment

With `--model scripts/trained/unet` (or another folder there) every step uses that model and its own work folder. The
table then also gives the share of images that still show what the prompt asked for.

`pip install 'bitpolicy[bench]'` installs the tools. A tool that needs its own environment goes into
`<work>/venv-<tool>`, which takes precedence. All rivals get the FP16 values of the denoiser. Their score is the result
of their weights in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path

import torch
from peers.assignments import all_entries
from peers.entry import MODEL, SHARES, WORK, Entry, read_entries
from peers.ours import add_checkpoint
from peers.rivals import Rivals
from peers.samples import HELD_OUT, plan_of, write_samples
from peers.scoring import Scores, decibels
from peers.selection import read_selection, select, write_selection

TOOLS = {
    "sdnq": "sdnq==0.2.8",
    "modelopt": "nvidia-modelopt==0.47.0",
    "quanto": "optimum-quanto==0.2.7",
    "gguf": "gguf==0.19.0",
}
REROUNDED = ", our rounding"  # ends the family name of an assignment that `reround` wrote
_PROMPTS = 32  # held-out prompts of the bundled pipeline; this many images show each of them once
_CHECKED = 2  # images of every entry that are compared with the tool's own model


def prepare(args: argparse.Namespace) -> None:
    write_samples(plan_of(args.model), args.work)


def tools(args: argparse.Namespace) -> None:
    for name, package in TOOLS.items():
        if not fnmatch(name, args.only):
            continue
        python = tool_python(args.work / f"venv-{name}", package)
        if python is None:
            print(f"{name}: pip install {package}, here or in {args.work}/venv-{name} with diffusers and transformers")
            continue
        script = Path(__file__).parent / "peers" / f"with_{name}.py"
        command = [python, script, "--model", args.model, "--work", args.work, "--check", str(_CHECKED)]
        subprocess.run([str(part) for part in command], check=True)


def tool_python(own: Path, package: str) -> Path | None:
    """The Python that runs a tool: that of its own environment if there is one, else this one if it has the exact
    version of the package."""
    if (own / "bin" / "python").is_file():
        return own / "bin" / "python"
    name, _, version = package.partition("==")
    found = next((d.version for d in distributions(name=name)), None)
    return Path(sys.executable) if found == version else None


def assignments(args: argparse.Namespace) -> None:
    plan = plan_of(args.model)
    for entry in all_entries(Rivals.of(plan, args.work), args.only):
        print(f"{entry.name:40} {entry.nbytes / plan.account.reference:6.2%}  {dict(entry.settings)}", flush=True)


def reround(args: argparse.Namespace) -> None:
    """Add entries with the same assignments, their weights rounded as our own probe finds best for each layer."""
    rivals = Rivals.of(plan_of(args.model), args.work, args.quantizer)
    for entry in [*read_entries(args.work / "candidates")]:
        formats = rivals.assigned(entry.name) if fnmatch(entry.name, args.only) else None
        if formats is not None and not entry.family.endswith(REROUNDED):
            setting = entry.name.partition("@")[0]
            made = rivals.write(f"{entry.family}{REROUNDED} #{setting}", formats, entry.share, entry.kind)
            print(f"{made.name:60} {made.nbytes / rivals.plan.account.reference:6.2%}", flush=True)


def add(args: argparse.Namespace) -> None:
    entry = add_checkpoint(args.work, args.name, args.checkpoint, args.share, args.family, args.kind)
    print(f"{entry.name}: {entry.nbytes:,} bytes")


def choose(args: argparse.Namespace) -> None:
    plan = plan_of(args.model)
    path = args.work / "selected.json"
    found = [entry for entry in read_entries(args.work / "candidates") if fnmatch(entry.family, args.only)]
    chosen = select(found, Scores(plan, args.work), plan.account.reference, lambda line: print(line, flush=True))
    write_selection(path, {**read_selection(path), **chosen})


def score(args: argparse.Namespace) -> None:
    plan = plan_of(args.model)
    scores = Scores(plan, args.work)
    rounds = [count for count in (_PROMPTS, 2 * _PROMPTS) if count < args.images] + [args.images]
    for images, entry in itertools.product(rounds, wanted(args)):  # a rough score of every entry comes first
        values = decibels(scores.errors(entry.name, "held_out", images))
        mean = sum(values) / len(values)
        print(
            f"{entry.name:48} {entry.nbytes / plan.account.reference:6.2%}  {mean:6.2f} dB ({len(values)})", flush=True
        )


def wanted(args: argparse.Namespace) -> list[Entry]:
    """The entries to score: those that match `--only`, otherwise the selected ones, our own first."""
    entries = {entry.name: entry for entry in read_entries(args.work / "candidates")}
    if args.only != "*":
        return [entry for name, entry in entries.items() if fnmatch(name, args.only)]
    chosen = read_selection(args.work / "selected.json")
    names = dict.fromkeys(own[f"{share:.2f}"] for share in SHARES for own in chosen.values() if f"{share:.2f}" in own)
    return [entries[name] for name in names if name in entries]


def table(args: argparse.Namespace) -> None:
    from peers.table import write_table

    plan = plan_of(args.model)
    write_table(
        Scores(plan, args.work), args.work, plan.account.reference, args.images, args.output or args.work / "table"
    )


def plot(args: argparse.Namespace) -> None:
    from peers.plot import draw_all, draw_six, read_points

    page = args.output.with_suffix(".md")
    points = read_points(page)
    draw_six(points, page.with_suffix(".png"))
    draw_all(points, page.with_name(f"{page.stem}-all.png"))


def why(args: argparse.Namespace) -> None:
    from peers.explain import explain

    rivals = Rivals.of(plan_of(args.model), args.work)
    explain(rivals, Scores(rivals.plan, args.work), args.images, args.output or args.work / "explained.md")


def picture(args: argparse.Namespace) -> None:
    from peers.picture import draw

    share = f"{args.share or SHARES[0]:.2f}"
    chosen = read_selection(args.work / "selected.json")
    rows = [(row, own[share]) for row, own in chosen.items() if fnmatch(row, args.only) and share in own]
    draw(Scores(plan_of(args.model), args.work), rows, args.output or args.work / "picture.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {"prepare": prepare, "tools": tools, "assignments": assignments, "reround": reround, "add": add}
    steps |= {"select": choose, "score": score, "table": table, "plot": plot, "explain": why, "picture": picture}
    parser.add_argument("step", choices=steps)
    parser.add_argument("name", nargs="?", help="add: name of the new entry")
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="a folder, such as one in scripts/trained; default: the bundled model"
    )
    parser.add_argument(
        "--work", type=Path, help=f"default: {WORK}; for another model, the folder of its name in there"
    )
    parser.add_argument(
        "--only", default="*", help="pattern of tools, families (assignments, select) or entries (reround, score)"
    )
    parser.add_argument("--images", type=int, default=HELD_OUT)
    parser.add_argument("--checkpoint", type=Path, help="add: a folder that search-policy or export wrote")
    parser.add_argument("--share", type=float, help="add, picture: the budget as a share of FP16")
    parser.add_argument("--family", default="bitpolicy", help="add: the row of the table")
    parser.add_argument("--kind", default="ours", choices=("ours", "assignment", "tool"))
    parser.add_argument("--quantizer", default="auto", help="reround: the rounding method")
    parser.add_argument("--output", type=Path, help="table: output path without extension")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.work = args.work or (WORK if args.model == MODEL else WORK / args.model.name)
    torch.set_num_threads(args.threads)
    steps[args.step](args)


if __name__ == "__main__":
    sys.exit(main())
