"""`bitpolicy probe`: the sensitivity table alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bitpolicy.cli.options import (
    DEFAULT_FORMATS,
    RUN,
    Component,
    Debug,
    Device,
    Dtype,
    Formats,
    Guidance,
    Json,
    Model,
    Probe,
    Prompts,
    Quiet,
    Revision,
    Seed,
    Steps,
    Variant,
    pipeline_call,
)
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats import parse_formats
from bitpolicy.prompting import load_prompts
from bitpolicy.sensitivity.probe import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.progress import Stages
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.settings import Settings
from bitpolicy.workflow import make_plan

OutputDir = Annotated[Path, typer.Option(help="Gets sensitivity.safetensors and sensitivity.csv.", rich_help_panel=RUN)]
Samples = Annotated[int, typer.Option(min=1, help="Calibration trajectories.", rich_help_panel=RUN)]
Vectors = Annotated[int, typer.Option(min=1, help="Random directions a sample (adjoint).", rich_help_panel=RUN)]
_SHOWN = 15  # layers in the printed table


def probe(
    model: Model = None,
    component: Component = None,
    output_dir: OutputDir = Path("bitpolicy-probe"),
    formats: Formats = DEFAULT_FORMATS,
    prompts: Prompts = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    samples: Samples = 16,
    vectors: Vectors = 2,
    seed: Seed = 0,
    probe: Probe = "adjoint",
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    variant: Variant = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score every layer by what quantizing it does to the finished image; print the worst, write them all."""
    settings = Settings(
        budget="100%",
        model=model,
        component=component,
        formats=tuple(format.name for format in parse_formats(formats)),
        prompts=tuple(load_prompts(prompts, bundled=False)) if prompts else None,
        call=tuple(pipeline_call(num_inference_steps, guidance_scale).items()),
        seed=seed,
        probe=probe,
        dtype=dtype,
        device=device,
        revision=revision,
        variant=variant,
        calibration_samples=samples,
        vectors=vectors,
    )
    if output_dir.is_file():
        raise BitPolicyError(f"--output-dir {output_dir} is a file; give a folder")
    plan = make_plan(settings)
    wanted = ProbeSettings(probe, plan.split.calibration, vectors)
    stages = Stages(quiet or as_json)
    run = ProbeRun(
        plan.trajectories, plan.layers, plan.formats, plan.source.storage, wanted, output_dir / "work", stages
    )
    table = run.table(run.reference())
    table.save(output_dir, plan.layers, plan.account)
    if as_json:
        print(
            json.dumps(
                {
                    "layers": len(table.layers),
                    "probe": table.probe,
                    "seconds": stages.seconds,
                    "output_dir": str(output_dir),
                }
            )
        )
    else:
        _show(table)
        print(f"{output_dir}/sensitivity.csv has all {len(table.layers)} layers")


def _show(table: SensitivityTable) -> None:
    worst = table.error.amax(1).argsort(descending=True)[:_SHOWN].tolist()
    shown = Table(
        "layer",
        *(f.name for f in table.formats),
        title=f"relative error of the final latent ({table.probe} probe), worst first",
    )
    for i in worst:
        shown.add_row(table.layers[i], *(f"{float(error):.2e}" for error in table.error[i]))
    Console().print(shown)
