"""Compare policies of equal bytes by their held-out PSNR on the bundled pipeline.

The rivals share the rounding method and the bias correction, so only the choice of formats differs:

    by hand   timestep embedding, input stem and output head in FP16; the largest layers in INT4, as many as needed;
              the rest in INT8; the remaining budget goes to wider formats greedily, largest layer first
    weight    exact knapsack on relative weight error, without looking at images
    exact     exact knapsack on the adjoint probe
    search    the study on top of it (--trials)

The prompts of the comparison are not used for calibration or search. Prints one table; writes JSON and a picture.

    python scripts/benchmark_policies.py --budgets 5MB --images 64 --trials 32
    python scripts/benchmark_policies.py --budgets 32% 36% 40% 5MB 50% 60% --images 32 --picture docs/bytes-psnr.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.search.budget import Budget
from bitpolicy.search.generation import Generations
from bitpolicy.search.problem import Problem
from bitpolicy.search.quality.psnr import Psnr
from bitpolicy.search.study.finalists import confirm
from bitpolicy.search.study.journal import journal
from bitpolicy.search.study.study import Study
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.reference import ReferencePass
from bitpolicy.settings import Settings
from bitpolicy.workflow.plan import Plan, make_plan

INT4, INT8 = format_named("int4"), format_named("int8")
KEPT = ("input_stem", "timestep_embedding", "output_head")  # roles, of layers outside the blocks


@dataclass(frozen=True)
class Row:
    """One policy's result."""

    budget: str
    rival: str
    nbytes: int
    share: float
    psnr: dict[str, float | int | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the bundled pipeline")
    parser.add_argument("--budgets", nargs="+", default=["5MB"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--trials", type=int, default=0, help="Optuna trials; 0 skips the search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark"), help="folder for probe records and JSON")
    parser.add_argument("--picture", type=Path, help="plot of bytes against PSNR")
    args = parser.parse_args()
    stages = Stages()
    settings = Settings(
        quantizer="rtn",
        budget="100%",
        model=args.model,
        seed=args.seed,
        trials=args.trials,
        held_out_samples=args.images,
    )
    plan = make_plan(settings)
    tables = {name: _probe(plan, replace(settings, probe=name), args.work, stages) for name in ("adjoint", "weight")}
    generations = Generations(
        plan.trajectories,
        quantization=Quantization(calibration=tables["adjoint"][0].calibration, storage=plan.source.storage),
    )
    reference = generations.references(stages.track(plan.split.held_out, "reference"))
    rows = []
    for asked in args.budgets:
        budget = Budget.parse(asked, plan.account)
        for rival, choices in _rivals(plan, budget, tables, generations, args, stages).items():
            psnr = Psnr.of(reference, generations.images(choices, plan.split.held_out))
            formats = {name: choice.format for name, choice in choices.items()}
            nbytes = plan.account.total(formats)
            assert nbytes <= budget.nbytes
            rows.append(Row(asked, rival, nbytes, nbytes / plan.account.reference, psnr.as_dict()))
            _print(rows[-1])
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "policies.json").write_text(json.dumps([vars(row) for row in rows], indent=2) + "\n")
    if args.picture:
        _plot(rows, plan.account.reference, args.images, args.picture)


def _print(row: Row) -> None:
    size = f"{row.budget:>6}  {row.rival:<8} {row.nbytes:>12,} bytes {row.share:6.1%}"
    print(f"{size}  mean {row.psnr['mean']:6.2f} dB  worst {row.psnr['min']:6.2f} dB", flush=True)


def _probe(plan: Plan, settings: Settings, work: Path, stages: Stages) -> tuple[ReferencePass, SensitivityTable]:
    run = plan.probe(settings, work, stages)
    reference = run.reference()
    return reference, run.table(reference)


def _rivals(
    plan: Plan,
    budget: Budget,
    tables: Mapping[str, tuple[ReferencePass, SensitivityTable]],
    generations: Generations,
    args: argparse.Namespace,
    stages: Stages,
) -> dict[str, Mapping[str, Choice]]:
    problems = {
        name: Problem(plan.layers, plan.formats, plan.account, table=table, budget=budget.nbytes)
        for name, (_, table) in tables.items()
    }
    exact = problems["adjoint"].choices(problems["adjoint"].solve())
    rivals: dict[str, Mapping[str, Choice]] = {
        "by hand": by_hand(plan, budget.nbytes),
        "weight": problems["weight"].choices(problems["weight"].solve()),
        "exact": exact,
    }
    if args.trials:
        args.work.mkdir(parents=True, exist_ok=True)
        storage = journal(str(args.work / "study.journal"))
        name = f"{budget.nbytes}-{args.trials}-{args.seed}"
        study = Study(problems["adjoint"], generations, plan.split.search, storage, name, args.seed)
        with stages.bar(args.trials, "search trials") as advance:
            study.run(args.trials, advance)
        rivals["search"] = confirm(study.best(3), generations, plan.split.confirm).choices
    return rivals


def usually_kept(plan: Plan) -> list[str]:
    """The layers that people usually leave unquantized."""
    return [layer.name for layer in plan.layers if layer.role in KEPT and layer.stage == "ends"]


def by_hand(plan: Plan, budget: int) -> dict[str, Choice]:
    """A careful manual policy: the usual layers in FP16, the largest narrowed until it fits, the budget then filled."""
    kept = usually_kept(plan)
    formats: dict[str, Format] = {layer.name: FP16 if layer.name in kept else INT8 for layer in plan.layers}
    by_size = sorted((n for n in formats if n not in kept), key=lambda n: -plan.account.layer(n, FP16))
    for name in by_size:
        if plan.account.total(formats) <= budget:
            break
        formats[name] = INT4
    for wider in (INT8, FP16):
        for name in by_size:
            trial = {**formats, name: wider}
            if (
                plan.account.layer(name, wider) > plan.account.layer(name, formats[name])
                and plan.account.total(trial) <= budget
            ):
                formats = trial
    return {layer.name: _corrected(layer, formats[layer.name]) for layer in plan.layers}


def _corrected(layer: Layer, format: Format) -> Choice:
    return Choice(format, bias_correction=format.packed and layer.has_bias)


def _plot(rows: list[Row], reference: int, images: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    styles = {"search": "D-", "exact": "o-", "by hand": "s--", "weight": "^:"}
    for rival in [name for name in styles if any(row.rival == name for row in rows)]:
        points = sorted((row.nbytes / 1e6, row.psnr["mean"]) for row in rows if row.rival == rival and row.psnr["mean"])
        axes.plot(*zip(*points, strict=True), styles[rival], label=rival)
    axes.set(
        xlabel=f"denoiser, MB (FP16: {reference / 1e6:.2f} MB)",
        ylabel=f"PSNR against FP16, dB (mean of {images} held-out images)",
    )
    axes.set_title("Equal bytes, same quantizer and bias correction; only the policy differs", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
