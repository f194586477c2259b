"""The effect of INT4 and INT8 on each small trained model: on one denoiser call, on the finished latents, on the image,
and on what the image shows.

    python scripts/int4_by_model.py                                 the bundled model and all of scripts/trained
    python scripts/int4_by_model.py --models scripts/trained/mmdit --images 64

Every layer has the same format: INT4 in groups of 64, INT4 with one scale per output channel, or INT8. Weights are
rounded to nearest, rounded to nearest with corrected biases, or rounded by GPTQ with corrected biases. The columns:

    call          error of the denoiser's output at the reference's own latents, relative to the output's power, in dB:
                  over the whole trajectory, and at its first and last recorded step
    bias, scale   shares of that error's power: the mean over samples at each step, and the part parallel to the output;
                  the rest is noise
    latents       error of the finished latents relative to their power, in dB
    PSNR          PSNR of the images, mean and worst
    right         share of images that still show their caption, among those whose reference does

Writes a Markdown table and JSON to --work. If it is interrupted, the same command continues it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peers.entry import MODEL, ROOT
from peers.own_model import OUTPUT, call
from peers.samples import captions_shown, plan_of, write_samples
from safetensors.torch import load_file

from bitpolicy.kernels.formats.format import Format
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.choice import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.search.quality.psnr import Psnr
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.settings import Settings
from bitpolicy.workflow.plan import Plan

FORMATS = ("int4", "int4-channel", "int8")
ROUNDINGS = NEAREST, CORRECTED, GPTQ = "nearest", "nearest, corrected", "gptq, corrected"
STEPS = 6  # recorded steps at which single calls are measured, evenly spread over the trajectory


@dataclass(frozen=True)
class Row:
    """One model in one format.

    Attributes:
        model, format, rounding: what was measured.
        share: bytes of the denoiser as a share of FP16.
        call, first, last: relative error of single calls, in dB: over all recorded steps, at the first and at the last.
        bias, scale: shares of the power of that error.
        latents: relative error of the finished latents, in dB.
        psnr, worst: mean and worst PSNR of the images, in dB.
        right: share of images that show their caption, among those whose reference does; None without captions.
    """

    model: str
    format: str
    rounding: str
    share: float
    call: float
    first: float
    last: float
    bias: float
    scale: float
    latents: float
    psnr: float
    worst: float
    right: float | None


@dataclass(frozen=True)
class Reference:
    """The unquantized model's recorded calls step by step, and its latents and images of the held-out samples."""

    calls: list[dict[str, torch.Tensor]]
    images: torch.Tensor
    latents: torch.Tensor
    shows: list[bool] | None


def measured(folder: Path, work: Path, images: int, done: Collection[tuple[str, str]]) -> Iterator[Row]:
    """The rows of one model, except for (format, rounding) pairs that are done."""
    plan = plan_of(folder, (*FORMATS, "fp16"))
    if not (work / "calls.safetensors").is_file():
        write_samples(plan, work)
    reference = referenced(plan, work, images)
    for rounding in ROUNDINGS:
        if all((format, rounding) in done for format in FORMATS):
            continue
        quantization, choices = uniform(plan, rounding, work)
        for format, of_format in choices.items():
            if (format.name, rounding) in done:
                continue
            with quantized(plan.trajectories.denoisers[0], of_format, quantization=quantization):
                errors = call_errors(plan, reference)
                drawn = list(plan.trajectories.images(plan.split.held_out[:images]))
            share = plan.account.total({name: choice.format for name, choice in of_format.items()})
            found = finished(plan, reference, drawn)
            yield Row(folder.name, format.name, rounding, share / plan.account.reference, **errors, **found)


def referenced(plan: Plan, work: Path, images: int) -> Reference:
    """Run the unquantized model on the held-out samples and read its recorded calls."""
    recorded = load_file(work / "calls.safetensors")
    order = recorded["timestep"].unique().flip(0)
    chosen = [order[i] for i in torch.linspace(0, len(order) - 1, min(STEPS, len(order))).round().long()]
    calls = [{name: value[recorded["timestep"] == t] for name, value in recorded.items()} for t in chosen]
    drawn = list(plan.trajectories.images(plan.split.held_out[:images]))
    pictures = torch.stack([image for image, _ in drawn])
    return Reference(calls, pictures, torch.stack([latent for _, latent in drawn]), _shown(plan, pictures))


def uniform(plan: Plan, rounding: str, work: Path) -> tuple[Quantization, dict[Format, dict[str, Choice]]]:
    """For each format, the choices that give it to every layer that it fits."""
    settings = Settings(budget="100%", probe="weight", quantizer="gptq" if rounding == GPTQ else "rtn")
    run = plan.probe(settings, work / "probes", Stages())
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
def call_errors(plan: Plan, reference: Reference) -> dict[str, float]:
    """Errors of single calls with the denoiser's current weights."""
    power, bias, scale, signal = (torch.zeros(len(reference.calls), dtype=torch.float64) for _ in range(4))
    for step, recorded in enumerate(reference.calls):
        exact = recorded[OUTPUT].double().flatten(1)
        error = call(plan.trajectories.denoisers[0], recorded).double().flatten(1) - exact
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
    plan: Plan, reference: Reference, drawn: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, float | None]:
    """Errors of the latents and images."""
    pictures, latents = (torch.stack([pair[i] for pair in drawn]) for i in (0, 1))
    psnr = Psnr.of(list(reference.images), list(pictures))
    error = (latents - reference.latents).double().square().sum() / reference.latents.double().square().sum()
    shows = _shown(plan, pictures)
    right = None
    if shows is not None and reference.shows is not None:
        right = sum(now for now, before in zip(shows, reference.shows, strict=True) if before) / sum(reference.shows)
    return {"latents": decibels(error), "psnr": psnr.mean, "worst": psnr.min, "right": right}


def _shown(plan: Plan, pictures: torch.Tensor) -> list[bool] | None:
    """Whether each held-out image shows its caption; None if the prompts are not captions."""
    return captions_shown([sample.prompt for sample in plan.split.held_out], pictures)


def decibels(ratio: torch.Tensor) -> float:
    """How far an error is below its signal: -10 log10 of the ratio."""
    return -10 * float(ratio.log10())


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as a Markdown table."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(_cell(name, row[name]) for name in heads) + " |" for row in rows]
    return "\n".join(lines)


def _order(row: Mapping[str, object]) -> tuple[object, ...]:
    return row["model"], FORMATS.index(str(row["format"])), ROUNDINGS.index(str(row["rounding"]))


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0%}" if name in ("share", "bias", "scale", "right") else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [MODEL, *sorted(path for path in (ROOT / "scripts" / "trained").iterdir() if path.is_dir())]
    parser.add_argument("--models", type=Path, nargs="+", default=every, help="pipeline folders")
    parser.add_argument("--images", type=int, default=32, help="number of held-out images")
    parser.add_argument(
        "--work", type=Path, default=Path("build/int4-by-model"), help="folder for recorded calls, probes and results"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kept = args.work / f"rows-{args.images}.json"
    rows: list[dict[str, object]] = json.loads(kept.read_text()) if kept.is_file() else []
    for folder in args.models:
        done = {(str(row["format"]), str(row["rounding"])) for row in rows if row["model"] == folder.name}
        if len(done) == len(FORMATS) * len(ROUNDINGS):
            continue
        for row in measured(folder.resolve(), args.work / folder.name, args.images, done):
            rows.append(asdict(row))
            print(" ".join(f"{name}={_cell(name, value)}" for name, value in rows[-1].items()), flush=True)
            kept.write_text(json.dumps(rows, indent=1) + "\n")
    (args.work / "table.md").write_text(table(sorted(rows, key=_order)) + "\n")


if __name__ == "__main__":
    main()
