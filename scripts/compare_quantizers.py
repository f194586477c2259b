"""What better rounding gains at equal bytes: held-out PSNR with every layer in one format, per rounding method.

`auto` uses for each layer the rounding method and the bias that the probe scores best; the others correct every bias.
The prompts of the comparison are not used for calibration or search. Prints one table and writes JSON.

    python scripts/compare_quantizers.py --formats int4 int6 int8 --images 64
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.quantizers.named import AUTO, QUANTIZERS, RTN
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.search.generation import Generations
from bitpolicy.search.quality.psnr import Psnr
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.settings import Settings
from bitpolicy.workflow.plan import Plan, make_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the bundled pipeline")
    parser.add_argument("--formats", nargs="+", default=["int4", "int6", "int8"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("build/quantizers"), help="folder for probe records and JSON")
    args = parser.parse_args()
    stages = Stages()
    settings = Settings(
        budget="100%",
        model=args.model,
        formats=(*args.formats, "fp16"),
        quantizer=AUTO,
        held_out_samples=args.images,
    )
    plan = make_plan(settings)
    run = plan.probe(settings, args.work, stages)
    reference = run.reference()
    table = run.table(reference)
    generations = Generations(
        plan.trajectories, quantization=Quantization(calibration=reference.calibration, storage=plan.source.storage)
    )
    images = generations.references(stages.track(plan.split.held_out, "reference"))
    rows = []
    for format in map(format_named, args.formats):
        for quantizer in (*QUANTIZERS, AUTO):
            choices = _choices(plan, table, format, quantizer)
            psnr = Psnr.of(images, generations.images(choices, plan.split.held_out))
            nbytes = plan.account.total({name: choice.format for name, choice in choices.items()})
            took = Counter(choice.quantizer for choice in choices.values())
            rows.append(
                {"format": format.name, "quantizer": quantizer, "bytes": nbytes, **psnr.as_dict(), "took": took}
            )
            print(f"{format.name:<8} {quantizer:<16} {nbytes:>12,} bytes", end="")
            print(f"  mean {psnr.mean:6.2f} dB  worst {psnr.min:6.2f} dB", flush=True)
    (args.work / "quantizers.json").write_text(json.dumps(rows, indent=2) + "\n")


def _choices(plan: Plan, table: SensitivityTable, format: Format, quantizer: str) -> dict[str, Choice]:
    if quantizer == AUTO:
        return {layer.name: table.choice(i, format) for i, layer in enumerate(plan.layers)}
    if quantizer == RTN:
        return {layer.name: Choice(format, layer.has_bias) for layer in plan.layers}
    return {layer.name: Choice(format, layer.has_bias, quantizer) for layer in plan.layers}


if __name__ == "__main__":
    main()
