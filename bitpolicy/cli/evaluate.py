"""`bitpolicy eval`: a checkpoint against its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitpolicy.cli.options import (
    MODEL,
    RUN,
    Call,
    Debug,
    Device,
    Dtype,
    Guidance,
    Json,
    Prompts,
    Quiet,
    Revision,
    Seed,
    Steps,
    Variant,
)
from bitpolicy.command import importing

QUALITY = "Quality"

Checkpoint = Annotated[Path, typer.Argument(help="The folder that search-policy or export wrote.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="The unquantized pipeline: hub id, folder or .safetensors file. Default: what the checkpoint was made "
        "from, as its policy.yaml records it.",
        rich_help_panel=MODEL,
    ),
]
Images = Annotated[int, typer.Option("--images", min=1, help="How many to compare.", rich_help_panel=RUN)]
Picture = Annotated[
    Path | None, typer.Option(help="Write the first images side by side to this PNG.", rich_help_panel=RUN)
]
Metrics = Annotated[
    str | None,
    typer.Option(
        help="Some of psnr, ssim, lpips, latent, fid, kid, clip, with commas, or all. Default: psnr, or all where "
        "--features or --real-images is given.",
        rich_help_panel=QUALITY,
    ),
]
Features = Annotated[
    Path | None,
    typer.Option(help="File or folder with the networks of lpips, fid, kid and clip.", rich_help_panel=QUALITY),
]
RealImages = Annotated[
    Path | None,
    typer.Option(help="Folder of pictures to measure fid and kid against, too.", rich_help_panel=QUALITY),
]
Computes = Annotated[
    str | None,
    typer.Option(
        "--compute",
        help="How packed layers multiply: exact, float (sums in another order), int8 (inputs rounded to 8 bits, too: "
        "faster, less accurate) or fp8 (inputs of fp8 layers rounded to float8). Default: what the checkpoint records, "
        "else exact.",
        rich_help_panel=RUN,
    ),
]


def evaluate(
    checkpoint: Checkpoint,
    model: Model = None,
    prompts: Prompts = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    call: Call = None,
    metrics: Metrics = None,
    features: Features = None,
    real_images: RealImages = None,
    images: Images = 16,
    picture: Picture = None,
    compute: Computes = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    variant: Variant = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """How close a checkpoint's images are to the unquantized model's, same prompts and seeds."""
    options = locals()
    with importing(options):
        from bitpolicy.cli.running.evaluate import run
    run(**options)
