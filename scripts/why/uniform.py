"""All layers in one format: the effect on one denoiser call, on the finished latents and on the image.

By default, the formats are INT4 in groups of 64, INT4 with one scale per output channel, and INT8. Weights are rounded
to nearest, to nearest with corrected biases, or by GPTQ with corrected biases. Under an activation
quantization, layers in a format of its kind round their inputs as well. The columns:

    call          error of the denoiser's output at the reference's own latents, relative to the output's power, in dB:
                  over the whole trajectory, and at its first and last recorded step
    bias, scale   shares of that error's power: the mean over samples at each step, and the part parallel to the output;
                  the rest is noise
    latents       error of the finished latents relative to their power, in dB
    psnr, worst   PSNR of the images in dB, mean and worst
    right         share of images that still show their caption, among those whose reference does
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peers.own_model import OUTPUT, call
from peers.samples import captions_shown
from why.subjects import Subject, decibels, relative

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.kernel import Compute
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.choice import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.search.quality.psnr import Psnr
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.settings import Settings

ROUNDINGS = NEAREST, CORRECTED, GPTQ = "nearest", "nearest, corrected", "gptq, corrected"


@dataclass(frozen=True)
class Reference:
    """The unquantized model's recorded calls step by step, and its latents and images of the held-out samples."""

    calls: list[dict[str, torch.Tensor]]
    images: torch.Tensor
    latents: torch.Tensor
    shows: list[bool] | None


@dataclass(frozen=True)
class Wanted:
    """What is measured of each model: every one of its formats with every rounding method.

    Attributes:
        compute: the activation quantization.
        images: the number of held-out images.
    """

    roundings: tuple[str, ...] = ROUNDINGS
    compute: Compute = Compute.EXACT
    images: int = 32


def uniform(subject: Subject, wanted: Wanted, done: Callable[[str, str], bool]) -> Iterator[dict[str, Any]]:
    """One row for each format and rounding method, except for those that are done."""
    plan = subject.plan
    packed = [format for format in plan.formats if format.packed]
    reference: Reference | None = None
    for rounding in wanted.roundings:
        if all(done(format.name, rounding) for format in packed):
            continue
        reference = reference or referenced(subject, wanted.images)
        quantization, choices = rounded(subject, rounding)
        quantization = replace(quantization, compute=wanted.compute)
        for format, of_format in choices.items():
            if done(format.name, rounding):
                continue
            with quantized(subject.denoiser, of_format, quantization=quantization):
                errors = call_errors(subject, reference)
                drawn = list(plan.trajectories.images(subject.samples[: wanted.images]))
            nbytes = plan.account.total({name: choice.format for name, choice in of_format.items()})
            about = {"format": format.name, "rounding": rounding, "share": nbytes / plan.account.reference}
            yield {**about, **errors, **finished(subject, reference, drawn)}


def referenced(subject: Subject, images: int) -> Reference:
    """Run the unquantized model on the held-out samples."""
    drawn = list(subject.plan.trajectories.images(subject.samples[:images]))
    pictures = torch.stack([image for image, _ in drawn])
    latents = torch.stack([latent for _, latent in drawn])
    return Reference(subject.calls(), pictures, latents, _shown(subject, pictures))


def rounded(subject: Subject, rounding: str) -> tuple[Quantization, dict[Format, dict[str, Choice]]]:
    """For each format, the choices that give it to every layer that it fits."""
    plan = subject.plan
    settings = Settings(budget="100%", probe="weight", quantizer="gptq" if rounding == GPTQ else "rtn")
    run = plan.probe(settings, subject.work / "probes", Stages())
    reference = run.reference()
    table = run.table(reference)
    found: dict[Format, dict[str, Choice]] = {}
    for format in (f for f in plan.formats if f.packed):
        fitting = [(i, layer) for i, layer in enumerate(plan.layers) if format.fits(layer.shape)]
        found[format] = {
            layer.name: Choice(format) if rounding == NEAREST else table.choice(i, format) for i, layer in fitting
        }
    return Quantization(reference.calibration, plan.source.storage), found


@torch.no_grad()
def call_errors(subject: Subject, reference: Reference) -> dict[str, float]:
    """Errors of single calls with the denoiser's current weights."""
    power, bias, scale, signal = (torch.zeros(len(reference.calls), dtype=torch.float64) for _ in range(4))
    for step, recorded in enumerate(reference.calls):
        exact = recorded[OUTPUT].double().flatten(1)
        error = call(subject.denoiser, recorded).double().flatten(1) - exact
        rows = len(error)
        of_rows, of_mean = error.square().sum(1).mean(), error.mean(0).square().sum()
        power[step], signal[step] = of_rows, exact.square().sum(1).mean()
        bias[step] = ((rows * of_mean - of_rows) / (rows - 1)).clamp(min=0)  # minus the part of the mean that is noise
        scale[step] = ((error * exact).sum(1).square() / exact.square().sum(1)).mean()
    each = power / signal
    shares = {"bias": float(bias.sum() / power.sum()), "scale": float(scale.sum() / power.sum())}
    return {
        "call": decibels(power.sum() / signal.sum()),
        "first": decibels(each[0]),
        "last": decibels(each[-1]),
        **shares,
    }


def finished(
    subject: Subject, reference: Reference, drawn: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, float | None]:
    """Errors of the latents and images."""
    pictures, latents = (torch.stack([pair[i] for pair in drawn]) for i in (0, 1))
    psnr = Psnr.of(list(reference.images), list(pictures))
    shows = _shown(subject, pictures)
    right = None
    if shows is not None and reference.shows is not None:
        right = sum(now for now, before in zip(shows, reference.shows, strict=True) if before) / sum(reference.shows)
    error = decibels(relative(latents, reference.latents))
    return {"latents": error, "psnr": psnr.mean, "worst": psnr.min, "right": right}


def _shown(subject: Subject, pictures: torch.Tensor) -> list[bool] | None:
    """Whether each held-out image shows its caption; None if the prompts are not captions."""
    return captions_shown([sample.prompt for sample in subject.samples], pictures)
