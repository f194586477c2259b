"""The commands: what each says of itself and which options it takes. `bitpolicy.cli.running` carries them out."""

from __future__ import annotations

from typing import Any

from bitpolicy.cli.command_options import (
    EvalOptions,
    ExportOptions,
    FormatsOptions,
    InspectOptions,
    ProbeRunOptions,
    ReportOptions,
    SearchOptions,
)
from bitpolicy.cli.options import CallOptions, takes
from bitpolicy.command import importing
from bitpolicy.settings import (
    AimOptions,
    PipelineOptions,
    ProbeOptions,
    QuantizationOptions,
    SplitOptions,
    StudyOptions,
)


@takes(
    AimOptions,
    PipelineOptions,
    CallOptions,
    QuantizationOptions,
    ProbeOptions,
    StudyOptions,
    SearchOptions,
    version=True,
)
def search(**options: Any) -> None:
    """Shrink a diffusion model to the size you ask for, with the least harm to its images.

    Scores every layer by what quantizing it does to the finished image, assigns INT4, INT8 or FP16 so that the whole
    fits --budget, checks the choice on real generations, and writes policy.yaml and a checkpoint that diffusers loads.

    Examples:

    search-policy --budget 5MB --output-dir out

    search-policy --target-psnr 45 --formats all --quantizer auto --output-dir small

    search-policy --component unet,text_encoder,vae --budget 40% --output-dir whole

    search-policy --frontier 20 --trials 0 --output-dir curve
    """
    with importing(options):
        from bitpolicy.cli.running.search import run
    run(options)


@takes(PipelineOptions, CallOptions, QuantizationOptions, ProbeOptions, SplitOptions, ProbeRunOptions)
def probe(**options: Any) -> None:
    """Score every layer by what quantizing it does to the finished image; print the worst, write them all.

    A stopped run continues when the same command is given again. Several GPUs or machines share the work:

    accelerate launch -m bitpolicy probe --model M --output-dir out
    """
    with importing(options):
        from bitpolicy.cli.running.probe import run
    run(options)


@takes(ExportOptions)
def export(**options: Any) -> None:
    """Write a packed checkpoint, a whole diffusers folder, from a policy file and the model it was made for.

    The model is not loaded: weights are read from its safetensors, quantized and written one layer at a time, so memory
    does not grow with the model. The same input gives the same bytes. A stopped export leaves the folder as it was.
    """
    with importing(options):
        from bitpolicy.cli.running.export import run
    run(ExportOptions(**options))


@takes(EvalOptions)
def evaluate(**options: Any) -> None:
    """Compare a checkpoint's images with the unquantized model's, for the same prompts and seeds."""
    with importing(options):
        from bitpolicy.cli.running.evaluate import run
    run(EvalOptions(**options))


@takes(InspectOptions, without=["num_inference_steps", "guidance_scale"])
def inspect(**options: Any) -> None:
    """List every layer with its role, stage, shape, format and bytes; or with --kernels, how it is multiplied."""
    with importing(options):
        from bitpolicy.cli.running.inspect import run
    run(InspectOptions(**options))


@takes(ReportOptions)
def report(**options: Any) -> None:
    """Draw what a probe found: one HTML file that needs no network, and pictures.

    `bitpolicy probe --split --check --output-dir FOLDER` makes everything the report can show.
    """
    with importing(options):
        from bitpolicy.cli.running.report import run
    run(ReportOptions(**options))


@takes(FormatsOptions)
def formats(target: str | None, **options: Any) -> None:
    """List all formats, or those that another program can load, as `--formats` takes them."""
    with importing(options):
        from bitpolicy.cli.running.formats import run
    run(target)
