"""`bitpolicy eval`: a checkpoint against its reference."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bitpolicy.cli.options import (
    RUN,
    Call,
    Debug,
    Device,
    Dtype,
    Guidance,
    Json,
    Model,
    Prompts,
    Quiet,
    Revision,
    Seed,
    Steps,
    Variant,
    pipeline_call,
)
from bitpolicy.cli.report import print_json
from bitpolicy.compare import save_comparison
from bitpolicy.loading import BUNDLED, Source, load_source
from bitpolicy.prompting import default_requests, load_requests
from bitpolicy.search.quality import Psnr
from bitpolicy.sensitivity.progress import Stages
from bitpolicy.sensitivity.samples import Sample, split_samples
from bitpolicy.sensitivity.trajectory import Trajectories
from bitpolicy.workflow import default_call, swapped_denoiser

Checkpoint = Annotated[Path, typer.Argument(help="The folder that search-policy or export wrote.")]
Images = Annotated[int, typer.Option("--images", min=1, help="How many to compare.", rich_help_panel=RUN)]
Picture = Annotated[
    Path | None, typer.Option(help="Write the first images side by side to this PNG.", rich_help_panel=RUN)
]
_SEED = 9_000_000_000  # far from the seeds of every search


def evaluate(
    checkpoint: Checkpoint,
    model: Model = None,
    prompts: Prompts = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    call: Call = None,
    images: Images = 16,
    picture: Picture = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    variant: Variant = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """PSNR of a checkpoint's images against the unquantized model's, same prompts and seeds."""
    source = load_source(model, dtype=dtype, device=device, revision=revision, variant=variant)
    bundled = model in (None, BUNDLED)
    arguments = {**default_call(bundled), **pipeline_call(num_inference_steps, guidance_scale, call)}
    requests = load_requests(prompts) if prompts else default_requests(source.pipe, bundled)
    samples = split_samples(requests, images, _SEED + seed)
    stages = Stages(quiet or as_json)
    reference = _images(source, arguments, stages.track(samples, "reference"))
    with swapped_denoiser(source, checkpoint):
        found = _images(source, arguments, stages.track(samples, "checkpoint"))
    psnr = Psnr.of(reference, found)
    if picture is not None:
        rows = [("reference", reference[:8]), ("checkpoint", found[:8])]
        save_comparison(picture, [sample.prompt for sample in samples[:8]], rows, psnr.per_image)
    if as_json:
        print_json({"psnr_db": psnr.as_dict()})
    elif psnr.mean is None:
        print(f"all {images} images are identical")
    else:
        print(f"PSNR mean {psnr.mean:.2f} dB, worst {psnr.min:.2f} dB over {images} images")


def _images(source: Source, call: dict[str, Any], samples: Iterable[Sample]) -> list[torch.Tensor]:
    return [image for image, _ in Trajectories(source.pipe, source.component, call).images(samples)]
