"""Options that several commands share."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bitpolicy import __version__
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import DEFAULT, WRITE

MODEL = "Model"
CALL = "Pipeline call"
RUN = "Run"

DEFAULT_FORMATS = ",".join(DEFAULT)

Model = Annotated[
    str | None,
    typer.Option(
        help="Hub id, diffusers folder or single .safetensors file. Default: the bundled emoji pipeline.",
        rich_help_panel=MODEL,
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        help="Where the configs of a single file are: a diffusers folder or hub id of the same kind of model. Default: "
        "the repository that diffusers takes the file for.",
        rich_help_panel=MODEL,
    ),
]
Component = Annotated[
    str | None,
    typer.Option(
        help="What to quantize, names with commas: unet,text_encoder,vae; or all. Default: the denoiser. With the VAE "
        "among them errors are those of the image, else of the final latent.",
        rich_help_panel=MODEL,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel=MODEL)]
Variant = Annotated[str | None, typer.Option(help="Weight files to load, e.g. fp16.", rich_help_panel=MODEL)]
Dtype = Annotated[
    str,
    typer.Option(
        help="Compute dtype: auto (float32 on the CPU, else as stored), float16, bfloat16, float32.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=MODEL)]
Offload = Annotated[
    bool,
    typer.Option(
        "--offload", help="Keep weights in main memory, for a model larger than the GPU.", rich_help_panel=MODEL
    ),
]
Formats = Annotated[str, typer.Option(help=f"Candidates: {WRITE}.", rich_help_panel=RUN)]
Quantizer = Annotated[
    str,
    typer.Option(
        help="Who rounds: gptq (errors make up for each other), rtn (to nearest), mse, hqq, gptq-trajectory, or "
        "auto: all are tried, and the one that harms the finished image least is kept.",
        rich_help_panel=RUN,
    ),
]
Compute = Annotated[
    str,
    typer.Option(
        help="How packed layers multiply: exact (dequantized weights), int8 (inputs are rounded to 8 bits, too): "
        "faster on CPUs with VNNI and on GPUs, for some accuracy, which is measured along with everything else; or fp8 "
        "(inputs of fp8 layers to float8, for GPUs from Ada on).",
        rich_help_panel=RUN,
    ),
]
Prompts = Annotated[
    Path | None, typer.Option(help="Text file, one prompt a line. Default: a built-in list.", rich_help_panel=CALL)
]
Steps = Annotated[
    int | None, typer.Option("--num-inference-steps", min=1, help="Sampling steps. Default: 20.", rich_help_panel=CALL)
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale", help="Classifier-free guidance. Default: the pipeline's own.", rich_help_panel=CALL
    ),
]
Call = Annotated[
    list[str] | None,
    typer.Option(
        "--call",
        metavar="NAME=VALUE",
        help="Any other argument of the pipeline call, e.g. --call height=512 --call num_frames=8. May be repeated.",
        rich_help_panel=CALL,
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration trajectories.", rich_help_panel=RUN)]
Seed = Annotated[
    int, typer.Option(min=0, help="Of samples, split and sampler: same seed, same policy.", rich_help_panel=RUN)
]
Probe = Annotated[
    str,
    typer.Option(
        help="How layers are scored: adjoint (backward through the sampler), stepwise (each step alone), "
        "ablation (one by one, slow), weight (no image at all).",
        rich_help_panel=RUN,
    ),
]
Remeasure = Annotated[
    int,
    typer.Option(
        min=0,
        help="At most so many scores that are too large to be predicted are measured, by quantizing and drawing.",
        rich_help_panel=RUN,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.", rich_help_panel=RUN)
]
Debug = Annotated[  # `bitpolicy.cli.main` looks for it before any command runs
    bool,
    typer.Option("--debug", help="Show the traceback of an error and other libraries' messages.", rich_help_panel=RUN),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.", rich_help_panel=RUN)]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"bitpolicy {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
]


def pipeline_call(steps: int | None, guidance: float | None, others: Sequence[str] | None = None) -> dict[str, Any]:
    """Arguments of the pipeline call that were given.

    Raises:
        BitPolicyError: one of `others` is not NAME=VALUE, or a number is not finite.
    """
    call = {"num_inference_steps": steps, "guidance_scale": guidance, **dict(map(_named_value, others or ()))}
    for name, value in call.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BitPolicyError(f"{name} is {value}; give a number")
    return {name: value for name, value in call.items() if value is not None}


def _named_value(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is JSON where it reads as such (8, 0.5, true, [1, 2]), else the text itself."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise BitPolicyError(f"--call {text!r} is not NAME=VALUE; write for example --call height=512")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
