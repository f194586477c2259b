"""Predicted and measured peak memory of a pipeline call, for several policies, image sizes and batch sizes.

One call of the unquantized pipeline predicts the peak of every policy. Each policy is then exported, reloaded and run,
and torch counts what it allocates (`measured_peak`). The subjects are the bundled pipeline and Stable Diffusion 1.5 in
its published configuration with random weights. Prints one table and writes JSON.

    python scripts/bench_peak.py
    python scripts/bench_peak.py --subjects stable-diffusion-1.5 --sizes 256 --batches 1 --policies mixed
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from published_configs import published

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.pipelines.loading import BUNDLED_FOLDER, open_pipeline
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.pipeline import export_pipeline
from bitpolicy.policies.footprint import measured_peak
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.policy_records import ModelReference
from bitpolicy.sensitivity.cost.peak_memory import PeakMemory, observe
from bitpolicy.sensitivity.samples import Sample

BUNDLED, SD15 = "bundled", "stable-diffusion-1.5"
INT4, INT8 = format_named("int4"), format_named("int8")
CANDIDATES = (INT4, INT8, FP16)
POLICIES = {"int4": (INT4,), "int8": (INT8,), "fp16": (FP16,), "mixed": CANDIDATES}
STEPS = {BUNDLED: 20, SD15: 1}


@dataclass(frozen=True)
class Row:
    """One measurement, in bytes."""

    subject: str
    device: str
    pixels: int
    batch_size: int
    policy: str
    weights: int
    activations: int
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=STEPS, default=[BUNDLED, SD15])
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        help="in pixels; default: 64 and 128 for the bundled pipeline, 256 for the other",
    )
    parser.add_argument(
        "--batches", nargs="+", type=int, help="default: 1 and 4 for the bundled pipeline, 1 for the other"
    )
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("build/bench_peak.json"))
    args = parser.parse_args()
    print("subject               pixels  batch  policy  weights MB  activations MB  predicted MB  measured MB   error")
    rows = []
    for subject in args.subjects:
        for row in measure(subject, args):
            rows.append(row)
            print(described(row), flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps([{**asdict(row), "error": row.error} for row in rows], indent=2) + "\n")
    worst = max(rows, key=lambda row: abs(row.error))
    print(f"largest error: {worst.error:+.2%} ({worst.subject}, {worst.policy}, {worst.pixels} x {worst.pixels})")


def measure(subject: str, args: argparse.Namespace) -> Iterator[Row]:
    """Predict at every size, then reload one policy at a time and measure it at every size."""
    device = torch.device(args.device)
    compute = torch.float32 if device.type == "cpu" else torch.float16
    default_sizes, default_batches = ((64, 128), (1, 4)) if subject == BUNDLED else ((256,), (1,))
    sizes = list(itertools.product(args.sizes or default_sizes, args.batches or default_batches))
    pipe = _bundled() if subject == BUNDLED else _stable_diffusion()
    with tempfile.TemporaryDirectory() as folder:
        policies = {name: _in_turn(pipe, POLICIES[name]) for name in args.policies}
        for name, formats in policies.items():
            _export(pipe, formats, Path(folder) / name)
        pipe.to(device, compute)
        started = time.perf_counter()
        predicted = {key: _observed(pipe, subject, *key) for key in sizes}
        print(f"{subject}: {len(sizes)} calls observed in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        for name, formats in policies.items():
            unet = UNet2DConditionModel.from_pretrained(Path(folder) / name / "unet", dtype=compute).to(device)
            packed = StableDiffusionPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
            packed.set_progress_bar_config(disable=True)
            for (pixels, batch), peak in predicted.items():
                measured = _drawn(packed, subject, pixels, batch)
                weights = peak.others + peak.account.total(formats)
                numbers = (weights, peak.activations(formats), peak.peak(formats), measured)
                yield Row(subject, device.type, pixels, batch, name, *numbers)


def described(row: Row) -> str:
    """One row of the printed table."""
    numbers = (row.weights, row.activations, row.predicted, row.measured)
    columns = "".join(f"{number / 1e6:{width}.1f}" for number, width in zip(numbers, (12, 16, 14, 13), strict=True))
    return f"{row.subject:22}{row.pixels:6}{row.batch_size:7}  {row.policy:6}{columns}{row.error:+8.2%}"


def _call(subject: str, pixels: int) -> dict[str, Any]:
    return {"num_inference_steps": STEPS[subject], "guidance_scale": 3.0, "height": pixels, "width": pixels}


def _embeddings(subject: str, batch: int, pipe: Any) -> dict[str, Any]:
    """Embeddings that replace the prompt of the pipeline without a text encoder."""
    if subject == BUNDLED:
        return {}
    like = {"device": pipe.device, "dtype": pipe.unet.dtype}
    return {name: torch.zeros(batch, 77, 768, **like) for name in ("prompt_embeds", "negative_prompt_embeds")}


def _observed(pipe: Any, subject: str, pixels: int, batch: int) -> PeakMemory:
    sample = Sample("pizza", 0, _embeddings(subject, 1, pipe))
    return observe(pipe, ["unet"], _call(subject, pixels), sample, CANDIDATES, batch)


def _drawn(pipe: Any, subject: str, pixels: int, batch: int) -> int:
    prompts = {"prompt": ["pizza"] * batch} if subject == BUNDLED else _embeddings(subject, batch, pipe)
    return measured_peak(pipe, lambda: pipe(**prompts, **_call(subject, pixels)))


def _in_turn(pipe: Any, formats: tuple[Format, ...]) -> dict[str, Format]:
    """Layer name -> format: each of `formats` in turn."""
    return {name: f for (name, _), f in zip(quantizable_layers(pipe.unet), itertools.cycle(formats), strict=False)}


def _export(pipe: Any, formats: Mapping[str, Format], folder: Path) -> None:
    model = ModelReference(id="bench", component="unet", class_name=type(pipe.unet).__name__, sha256="")
    export_pipeline(
        pipe, ["unet"], Policy.of({n: Choice(f) for n, f in formats.items()}, model=model), Calibration(), folder
    )


def _bundled() -> Any:
    pipe = open_pipeline(BUNDLED_FOLDER, torch.float32)
    to_storage(pipe.unet, torch.float16)
    return pipe


def _stable_diffusion() -> Any:
    """The published U-Net and VAE with random weights. Has no text encoder, so calls pass embeddings."""
    torch.manual_seed(0)
    unet: Any = published("stable-diffusion-v1-5").to(torch.float16).to_empty(device="cpu").eval()
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).half()
    for parameter in unet.parameters():
        parameter.data.normal_(std=0.01)
    parts: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae.eval(), None, None, unet, DDIMScheduler(), **parts)


if __name__ == "__main__":
    main()
