"""Cost of the adjoint probe on denoisers of full size: memory beyond the weights, seconds per step, projected totals.

The denoisers have the published configurations of SD 1.5, SDXL and DiT-XL/2, with random weights and random text
embeddings. Each model runs in its own process: one plain trajectory, then one adjoint sample. Peak memory is the
kernel's count of resident bytes, reset between the two. Latents and step counts are small enough for two cores; the
numbers of forward passes are for full length. Prints one line per model and writes JSON.

    python scripts/bench_probe.py --dtype float32 --models stable-diffusion-v1-5 DiT-XL-2-256
    python scripts/bench_probe.py --dtype bfloat16 --models stable-diffusion-xl-base-1.0
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from published_configs import published
from torch import nn

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.cost.forwards import adjoint_forwards
from bitpolicy.sensitivity.probes.adjoint import AdjointSketches
from bitpolicy.sensitivity.probes.directions import Random
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

MODELS = ("stable-diffusion-v1-5", "stable-diffusion-xl-base-1.0", "DiT-XL-2-256")
FULL_STEPS = 20
FULL_VECTORS = {"stable-diffusion-xl-base-1.0": 8}  # per sample; 2 for the others
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=128, help="height and width of the image")
    parser.add_argument("--vectors", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("build/bench_probe.json"))
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    rows = []
    for model in args.models:
        line = [sys.executable, __file__, "--one", model, "--steps", args.steps, "--pixels", args.pixels]
        line += ["--vectors", args.vectors, "--dtype", args.dtype, "--device", args.device]
        done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{model}: {done.stderr[-3000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(described(rows[-1]), flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one model in this process."""
    torch.manual_seed(0)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    trajectories, sample = _loop(args.one, dtype, device, args.pixels, args.steps)
    layers = trajectories.target.layers
    weights = sum(p.numel() * p.element_size() for p in trajectories.target.parameters())
    plain = _timed(lambda: list(trajectories.latents([sample])), device)
    steps = trajectories.steps

    def probe() -> None:
        formats = [format_named("int4"), format_named("int8")]
        made = AdjointSketches(trajectories, candidates(formats), recompute_inside=True, quantization=Quantization())
        list(made.sketches(sample, [Random(k) for k in range(args.vectors)]))

    adjoint = _timed(probe, device)
    full_steps, full_vectors = FULL_STEPS, FULL_VECTORS.get(args.one, 2)
    ablation = len(layers) * 2 * full_steps
    return {
        "model": args.one,
        "parameters": sum(p.numel() for p in trajectories.target.parameters()),
        "layers": len(layers),
        "weights_mib": weights / MIB,
        "largest_layer_mib": max(layer.weight.nbytes for layer in layers.values()) / MIB,
        "plain": plain,
        "adjoint": adjoint,
        "seconds_a_step": adjoint["seconds"] / steps,
        "steps": steps,
        "vectors": args.vectors,
        "full_steps": full_steps,
        "full_vectors": full_vectors,
        "forwards_a_sample": {
            str(inside): full_steps + adjoint_forwards(full_steps, full_vectors, inside) for inside in (False, True)
        },
        "ablation_forwards_a_sample": ablation,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "dtype": args.dtype,
        "pixels": args.pixels,
    }


def described(row: dict[str, Any]) -> str:
    """The printed line of one model."""
    plain, adjoint = row["plain"], row["adjoint"]
    counts = ", ".join(
        f"{row['ablation_forwards_a_sample'] / n:.0f}x ({'checkpointed inside' if inside == 'True' else 'plain'})"
        for inside, n in row["forwards_a_sample"].items()
    )
    return (
        f"{row['model']}: {row['parameters'] / 1e6:.0f}M parameters, {row['layers']} layers, weights "
        f"{row['weights_mib']:.0f} MiB {row['dtype']}; peak beyond what was already resident: trajectory "
        f"{plain['peak_mib']:.0f} MiB, adjoint {adjoint['peak_mib']:.0f} MiB (largest layer "
        f"{row['largest_layer_mib']:.0f} MiB); {plain['seconds'] / row['steps']:.1f} s per plain step, "
        f"{row['seconds_a_step']:.1f} s per adjoint step with {row['vectors']} vectors on {row['device']}; at "
        f"{row['full_steps']} steps and {row['full_vectors']} vectors cheaper than ablation by {counts}"
    )


def _loop(model: str, dtype: torch.dtype, device: torch.device, pixels: int, steps: int) -> tuple[Trajectories, Sample]:
    denoiser: Any = published(model).to(dtype).to_empty(device=device).eval()
    _randomize(denoiser)
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    vae = vae.to(device, dtype).eval()
    call = {"num_inference_steps": steps}
    if model == "DiT-XL-2-256":
        pipe: Any = DiTPipeline(denoiser, vae, DDIMScheduler())
        return Trajectories(pipe, ["transformer"], call), Sample("207", 0)
    arguments: dict[str, Any] = {"height": pixels, "width": pixels}
    width = denoiser.config.cross_attention_dim
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        arguments[name] = torch.randn(1, 77, width).to(device, dtype)
    if model == "stable-diffusion-xl-base-1.0":
        for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
            arguments[name] = torch.randn(1, 1280).to(device, dtype)
        pipe = StableDiffusionXLPipeline(vae, None, None, None, None, denoiser, EulerDiscreteScheduler())
    else:
        parts: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(vae, None, None, denoiser, DDIMScheduler(), **parts)
    return Trajectories(pipe, ["unet"], call), Sample("", 0, arguments)


def _randomize(model: nn.Module) -> None:
    """Draw weights small enough for activations to stay finite through all layers."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                nn.init.normal_(parameter, std=0.5 * fan_in**-0.5)
            else:
                nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)
        for buffer in module.buffers(recurse=False):
            if buffer.is_floating_point():
                nn.init.normal_(buffer, std=0.02)


def _timed(work: Any, device: torch.device) -> dict[str, float]:
    """Seconds, and peak memory beyond what was in use at the start."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        before = _status("VmRSS")
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _status("VmHWM")
    return {"seconds": time.perf_counter() - start, "peak_mib": (peak - before) / MIB}


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
