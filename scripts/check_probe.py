"""The adjoint probe against the truth: quantize one layer, run the real trajectory, measure.

Both use the same calibration samples. Prints, for each format, Spearman's rank correlation over layers and the median
ratio of predicted to measured error, and what each probe cost in seconds.

    python scripts/check_probe.py                 # every layer of the bundled pipeline; long
    python scripts/check_probe.py --every 4       # every fourth layer
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from scipy.stats import spearmanr

from bitpolicy.sensitivity.probe import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.progress import Stages
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.settings import Settings
from bitpolicy.workflow import Plan, make_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the bundled pipeline")
    parser.add_argument("--every", type=int, default=1, help="measure only every n-th layer")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--vectors", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark"), help="probe records")
    args = parser.parse_args()
    plan = make_plan(Settings(budget="100%", model=args.model, calibration_samples=args.samples))
    adjoint = _table(plan, "adjoint", args.vectors, args.work)
    measured = replace(plan, layers=plan.layers[:: args.every])
    ablation = _table(measured, "ablation", args.vectors, args.work)
    rows = [plan.layers.index(layer) for layer in measured.layers]
    for column, format in enumerate(adjoint.formats):
        predicted, true = adjoint.error[rows, column], ablation.error[:, column]
        ratio = float((predicted / true).median())
        rank = float(spearmanr(predicted.numpy(), true.numpy()).statistic)
        print(f"{format.name:<8} {len(rows)} layers: Spearman {rank:.3f}, median predicted / measured {ratio:.2f}")


def _table(plan: Plan, probe: str, vectors: int, work: Path) -> SensitivityTable:
    stages = Stages()
    settings = ProbeSettings(probe, plan.split.calibration, vectors)
    run = ProbeRun(plan.trajectories, plan.layers, plan.formats, plan.source.storage, settings, work, stages)
    table = run.table(run.reference())
    print(f"{probe}: {stages.seconds['probe']:.0f} s for {len(plan.layers)} layers", flush=True)
    return table


if __name__ == "__main__":
    main()
