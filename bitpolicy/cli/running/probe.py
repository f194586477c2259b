"""The implementation of `bitpolicy probe`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.table import Table

from bitpolicy.check import Check, check
from bitpolicy.cli.running.settings import settings_of
from bitpolicy.cli.running.tables import print_table
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.output_folder import require_no_search
from bitpolicy.policies.storage.atomic import require_nameable
from bitpolicy.policies.storage.folder_lock import working_in
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.table_files import ModelContext, write_table
from bitpolicy.sensitivity.workers import is_main, launched
from bitpolicy.workflow.forecast import Forecast
from bitpolicy.workflow.plan import make_plan

_SHOWN = 15  # layers in the printed table


def run(options: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        options: the command's options, by name.
    """
    output_dir, as_json = options["output_dir"], options["as_json"]
    policies = options["check_policies"] if options["check_it"] else 0
    settings = settings_of(options, budget="100%")
    require_nameable(output_dir)
    if output_dir.is_file():
        raise BitPolicyError(f"--output-dir {output_dir} is a file; give a folder")
    require_no_search(output_dir)
    stages = Stages(options["quiet"] or as_json or not is_main())
    with stages.whole_run(), ExitStack() as stack:
        plan = make_plan(settings)
        stages.expect(Forecast(settings, plan).of_probe(options["split"], policies))
        if is_main():
            stack.enter_context(working_in(output_dir))
        probing = plan.probe(settings, output_dir / "work", stages)
        reference = probing.reference()
        table = probing.table(reference)
        error_split = probing.split(reference) if options["split"] else None
        checked = check(probing, table, reference, plan.account, policies) if policies else None
        if table.probe == "adjoint":
            table = probing.remeasured(table, reference, table.largest(settings.remeasure))
        if not is_main():
            return
        write_table(table, output_dir, ModelContext(plan.layers, plan.account, plan.model))
        if error_split is not None:
            error_split.save(output_dir / "split.safetensors")
        if checked is not None:
            checked.save(output_dir / "check.json")
    if as_json:
        _print_json(table, checked, stages, output_dir)
        return
    _print(table, checked, stages, output_dir, "image" if plan.trajectories.draws else "final latent")
    if never := plan.never_called(table, reference.calibration):
        print(f"no sample called {len(never)} layers, e.g. {never[0]}: their scores of 0 mean nothing")


def _print_json(table: SensitivityTable, checked: Check | None, stages: Stages, folder: Path) -> None:
    result: dict[str, object] = {"layers": len(table.layers), "probe": table.probe}
    if table.cost is not None:
        result["forwards"], result["times_below_ablation"] = table.cost.total, round(table.cost.gain, 2)
    if checked is not None:
        result["check"] = {a.what: [a.spearman, a.median_ratio] for a in checked.agreements()}
    print(json.dumps({**result, "seconds": stages.seconds, "output_dir": str(folder)}, allow_nan=False))


def _print(table: SensitivityTable, checked: Check | None, stages: Stages, folder: Path, signal: str) -> None:
    """Print the results for people.

    Args:
        signal: what the errors are errors of.
    """
    worst = table.error.amax(1).argsort(descending=True)[:_SHOWN].tolist()
    what = "denoiser's outputs" if table.probe == "stepwise" else signal
    shown = Table(
        "layer",
        *(f.name for f in table.formats),
        *(["from inputs"] if table.inputs is not None else []),
        title=f"relative error of the {what} ({table.probe} probe), worst first; * measured",
    )
    for i in worst:
        numbers = [
            f"{float(error):.2e}{'*' if table.source(i, j) != table.probe else ''}"
            for j, error in enumerate(table.error[i])
        ]
        of_inputs = [] if table.inputs is None else [f"{float(table.inputs[i].max()):.2e}"]
        shown.add_row(table.layers[i], *numbers, *of_inputs)
    print_table(shown)
    if checked is not None:
        print_table(_agreement(checked))
    if table.cost is not None:
        print(f"cost: {table.cost}")
    if launched():
        print(f"work shared by {os.environ['WORLD_SIZE']} processes")
    print(f"seconds: {', '.join(f'{stage} {seconds:.0f}' for stage, seconds in stages.seconds.items())}")
    print(f"{folder}/sensitivity.csv has all {len(table.layers)} layers; `bitpolicy report {folder}` plots them")


def _agreement(checked: Check) -> Table:
    shown = Table(
        "predicted against measured", "n", "Spearman", "median ratio", "within 2x", title="check", title_justify="left"
    )
    for a in checked.agreements():
        rank = "" if a.spearman is None else f"{a.spearman:.3f}"
        shown.add_row(a.what, str(a.n), rank, f"{a.median_ratio:.2f}", f"{a.within_2x:.0%}")
    null = checked.policies[0]
    shown.add_row("nothing quantized", "1", "", "", f"predicted {null.predicted:g}, measured {null.measured:g}")
    return shown
