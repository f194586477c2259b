"""`bitpolicy probe`: the sensitivity table, what the errors are made of, and how far the probe can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitpolicy.cli.options import (
    DEFAULT_FORMATS,
    RUN,
    Call,
    Component,
    Compute,
    Config,
    Debug,
    Device,
    Dtype,
    Formats,
    Guidance,
    Json,
    Model,
    Offload,
    Probe,
    Prompts,
    Quantizer,
    Quiet,
    Remeasure,
    Revision,
    Samples,
    Seed,
    Steps,
    Variant,
)
from bitpolicy.command import importing
from bitpolicy.kernels.names import DEFAULT_QUANTIZER

OutputDir = Annotated[
    Path,
    typer.Option(help="Gets sensitivity.safetensors and .csv, split.safetensors, check.json.", rich_help_panel=RUN),
]
Vectors = Annotated[int, typer.Option(min=1, help="Random directions a sample.", rich_help_panel=RUN)]
Split = Annotated[
    bool,
    typer.Option("--split", help="Also tell bias, scale error and noise apart, step by step.", rich_help_panel=RUN),
]
Shared = Annotated[int, typer.Option(min=1, help="Directions common to all samples (--split).", rich_help_panel=RUN)]
CheckIt = Annotated[
    bool,
    typer.Option("--check", help="Compare with the truth: every layer, random policies. Slow.", rich_help_panel=RUN),
]
CheckPolicies = Annotated[int, typer.Option(min=2, help="Random policies of --check.", rich_help_panel=RUN)]


def probe(
    model: Model = None,
    component: Component = None,
    output_dir: OutputDir = Path("bitpolicy-probe"),
    formats: Formats = DEFAULT_FORMATS,
    prompts: Prompts = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    call: Call = None,
    samples: Samples = 16,
    vectors: Vectors = 2,
    remeasure: Remeasure = 8,
    split: Split = False,
    shared: Shared = 8,
    check_it: CheckIt = False,
    check_policies: CheckPolicies = 100,
    seed: Seed = 0,
    probe: Probe = "adjoint",
    quantizer: Quantizer = DEFAULT_QUANTIZER,
    compute: Compute = "exact",
    dtype: Dtype = "auto",
    device: Device = "auto",
    offload: Offload = False,
    revision: Revision = None,
    variant: Variant = None,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score every layer by what quantizing it does to the finished image; print the worst, write them all.

    A stopped run goes on when the same command is given again. Several GPUs or machines share the work:

    accelerate launch -m bitpolicy probe --model M --output-dir out
    """
    options = locals()
    with importing(options):
        from bitpolicy.cli.running.probe import run
    run(options)
