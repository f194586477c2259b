"""`bitpolicy eval`: a checkpoint against its reference."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bitpolicy.cli.metrics_table import print_metrics
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
    pipeline_call,
)
from bitpolicy.cli.report import print_json
from bitpolicy.kernels.kernel import Compute, parse_compute
from bitpolicy.pipelines.loading import BUNDLED, Source
from bitpolicy.pipelines.origin import load_reference
from bitpolicy.pipelines.prompting import default_requests, load_requests
from bitpolicy.search.quality.features import require_pictures
from bitpolicy.search.quality.metrics import Comparison, measure, parse_metrics
from bitpolicy.search.quality.networks import Networks
from bitpolicy.search.quality.psnr import Psnr
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.samples import Sample, split_samples
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.settings import require_seed
from bitpolicy.workflow.compare import save_comparison
from bitpolicy.workflow.decision import networks_for
from bitpolicy.workflow.plan import default_call, warn_of_idle_arguments
from bitpolicy.workflow.search_run import swapped_components

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
_SEED = 9_000_000_000  # far from the seeds of every search


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
    asked = _asked(metrics, features, real_images)
    wanted = None if compute is None else parse_compute(compute)
    require_seed(seed)
    source = load_reference(checkpoint, model, revision=revision, variant=variant, dtype=dtype, device=device)
    bundled = source.id == BUNDLED
    given = pipeline_call(num_inference_steps, guidance_scale, call)
    arguments = {**default_call(source.pipe, bundled), **given}
    requests = load_requests(prompts) if prompts else default_requests(source.pipe, bundled)
    samples = split_samples(requests, images, _SEED + seed)
    stages = Stages(quiet or as_json)
    warn_of_idle_arguments(Trajectories(source.pipe, source.component, arguments), samples[0], given, stages)
    comparison, used = _drawn(source, checkpoint, wanted, arguments, samples, real_images, stages)
    psnr = Psnr.of(comparison.reference, comparison.images)
    if picture is not None:
        rows = [("reference", comparison.reference[:8]), ("checkpoint", comparison.images[:8])]
        save_comparison(picture, [sample.prompt for sample in samples[:8]], rows, psnr.per_image)
    if not asked:
        _print_psnr(psnr, used, as_json)
        return
    results = measure(asked, comparison, networks_for(source.id, bundled, features, source))
    if as_json:
        found = {name: result.as_dict() for name, result in results.items()}
        print_json({"psnr_db": psnr.as_dict(), "compute": used, "metrics": found})
    else:
        print_metrics(results, images)


def _asked(metrics: str | None, features: Path | None, real_images: Path | None) -> tuple[str, ...]:
    """The metrics that were asked for, none for the default; what is wrong is said before a model is loaded."""
    asked = parse_metrics(metrics) if metrics is not None else ()
    Networks(features).require()
    if real_images is not None:
        require_pictures(real_images)
    return asked or (parse_metrics("all") if features or real_images else ())


def _drawn(
    source: Source,
    checkpoint: Path,
    compute: Compute | None,
    call: dict[str, Any],
    samples: list[Sample],
    real: Path | None,
    stages: Stages,
) -> tuple[Comparison, Compute]:
    """The images of both, with their latents, and how the checkpoint's were computed.

    The checkpoint's come first: if it cannot be loaded, that is said before any time was spent.
    """
    with swapped_components(source, checkpoint, compute) as used:
        images, after = _images(source, call, stages.track(samples, "checkpoint"))
    reference, before = _images(source, call, stages.track(samples, "reference"))
    takes_text = "prompt" in inspect.signature(type(source.pipe).__call__).parameters
    prompts = [sample.prompt for sample in samples] if takes_text else None
    return Comparison(reference, images, (before, after), prompts, real), used


def _images(
    source: Source, call: dict[str, Any], samples: Iterable[Sample]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Images and final latents."""
    both = list(Trajectories(source.pipe, source.component, call).images(samples))
    return [image for image, _ in both], [latent for _, latent in both]


def _print_psnr(psnr: Psnr, compute: Compute, as_json: bool) -> None:
    count = len(psnr.per_image)
    how = "" if compute is Compute.EXACT else f", compute {compute}"
    if as_json:
        print_json({"psnr_db": psnr.as_dict(), "compute": compute})
    elif psnr.mean is None:
        print(f"all {count} images are identical{how}")
    else:
        print(f"PSNR mean {psnr.mean:.2f} dB, worst {psnr.min:.2f} dB over {count} images{how}")
