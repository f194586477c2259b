"""The implementation of `bitpolicy eval`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bitpolicy.cli.command_options import EvalOptions
from bitpolicy.cli.running.metrics_table import print_metrics
from bitpolicy.cli.running.results import print_json
from bitpolicy.kernels.kernel import Compute, parse_compute
from bitpolicy.pipelines.loading import BUNDLED, Source
from bitpolicy.pipelines.origin import load_reference
from bitpolicy.pipelines.prompting import default_requests, load_requests
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.checkpoints.checkpoint import checkpoint_bytes
from bitpolicy.search.quality.features import require_pictures
from bitpolicy.search.quality.metrics import Comparison, measure, parse_metrics
from bitpolicy.search.quality.networks import Networks
from bitpolicy.search.quality.psnr import Paired, Psnr
from bitpolicy.search.quality.sound import compared, sampling_rate
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.samples import Sample, split_samples
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.workflow.compare import Row, save_comparison, save_sounds
from bitpolicy.workflow.decision import networks_for
from bitpolicy.workflow.plan import default_call, warn_of_idle_arguments
from bitpolicy.workflow.swapped import swapped_components

_SEED = 9_000_000_000  # far from the seeds of every search


def run(options: EvalOptions) -> None:
    """Run the command with these options."""
    asked = _asked(options.metrics, options.features, options.real_images)
    wanted = None if options.compute is None else parse_compute(options.compute)
    source = load_reference(
        options.checkpoint,
        options.model,
        revision=options.revision,
        variant=options.variant,
        dtype=options.dtype,
        device=options.device,
    )
    bundled = source.id == BUNDLED
    given = options.arguments
    arguments = {**default_call(source.pipe, bundled), **given}
    requests = load_requests(options.prompts) if options.prompts else default_requests(source.pipe, bundled)
    samples = split_samples(requests, options.images, _SEED + options.seed)
    stages = Stages(options.quiet or options.as_json)
    warn_of_idle_arguments(Trajectories(source.pipe, source.components, arguments), samples[0], given, stages)
    comparison, used = _drawn(source, options.checkpoint, wanted, arguments, samples, options.real_images, stages)
    psnr = Psnr.of(comparison.reference, comparison.images)
    if options.picture is not None:
        rows = _rows(source, options, comparison)
        save_comparison(options.picture, [sample.prompt for sample in samples], rows)
        save_sounds(options.picture, rows, comparison.rate)
    if not asked:
        closeness = compared(comparison.reference, comparison.images, comparison.rate)
        _print_closeness(closeness, psnr, used, options.as_json)
        return
    results = measure(asked, comparison, networks_for(source.id, bundled, options.features, source))
    if options.as_json:
        found = {name: result.as_dict() for name, result in results.items()}
        print_json({"psnr_db": psnr.as_dict(), "compute": used, "metrics": found})
    else:
        print_metrics(results, options.images)


def _rows(source: Source, options: EvalOptions, images: Comparison) -> list[Row]:
    """The reference and the checkpoint. A checkpoint has no rounding for formats that it does not use, so there is no
    row for them."""
    before = ByteAccount.of(source.target, source.storage).reference
    after = sum(checkpoint_bytes(options.checkpoint / name) for name in source.components)
    return [
        Row.of("original", before, images.reference),
        Row.of("this checkpoint", after, images.images, images.reference, images.rate),
    ]


def _asked(metrics: str | None, features: Path | None, real_images: Path | None) -> tuple[str, ...]:
    """The requested metrics, or none for the default. Mistakes are reported before a model is loaded."""
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
    """The images of both pipelines with their latents, and the compute mode of the checkpoint.

    The checkpoint is drawn first: if it cannot be loaded, the error comes before any time is spent.
    """
    with swapped_components(source, checkpoint, compute) as used:
        images, after = _images(source, call, stages.track(samples, "checkpoint"))
    reference, before = _images(source, call, stages.track(samples, "reference"))
    takes_text = "prompt" in inspect.signature(type(source.pipe).__call__).parameters
    prompts = [sample.prompt for sample in samples] if takes_text else None
    return Comparison(reference, images, (before, after), prompts, real, sampling_rate(source.pipe)), used


def _images(
    source: Source, call: dict[str, Any], samples: Iterable[Sample]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Images and final latents."""
    both = list(Trajectories(source.pipe, source.components, call).images(samples))
    return [image for image, _ in both], [latent for _, latent in both]


def _print_closeness(found: Paired, psnr: Psnr, compute: Compute, as_json: bool) -> None:
    """The PSNR of images, or the mel distance of sounds."""
    count, sounds = len(found.per_image), found.name == "mel"
    suffix = "" if compute is Compute.EXACT else f", compute {compute}"
    if as_json:
        distance = {"mel_db": found.as_dict()} if sounds else {}
        print_json({"psnr_db": psnr.as_dict(), **distance, "compute": compute})
        return
    title, things = ("mel distance", "sounds") if sounds else ("PSNR", "images")
    if found.mean is None:
        print(f"all {count} {things} are identical{suffix}")
    else:
        print(f"{title} mean {found.mean:.2f} dB, worst {found.worst:.2f} dB over {count} {things}{suffix}")
