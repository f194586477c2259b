"""Cost of the adjoint probe on denoisers of full size: memory beyond the weights, and seconds per step.

The denoisers have the published configurations of SD 1.5, SDXL and DiT-XL/2, with random weights and random text
embeddings. Each model runs in its own process. A round is a sample with two probe vectors, then a plain trajectory: the
first sketch includes the forward trajectory and what is done once a run, the second one does not. An adjoint step is
one step of the second sketch, with its share of the products at the end of a sketch if a trajectory has 20 steps. On
the CPU, seconds are processor seconds; on one thread these equal the wall time of an idle machine. Peak memory is the
kernel's count of resident bytes, reset before each measurement.

Latents and step counts are small enough for two cores; the numbers of forward passes are for full length. Candidates of
`--quantizer gptq` are read from files, as in a run; their codes are rounded to nearest, since only the reading counts
here. Prints one line per model and writes JSON.

    python scripts/bench_probe.py --dtype float32 --models stable-diffusion-v1-5 DiT-XL-2-256
    python scripts/bench_probe.py --dtype bfloat16 --models stable-diffusion-xl-base-1.0 --probe-memory 5GB
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
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

from bitpolicy.kernels.formats.named import parse_formats
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.quantization import Quantization
from bitpolicy.search.budget import read_bytes
from bitpolicy.sensitivity.cost.forwards import adjoint_forwards
from bitpolicy.sensitivity.probes.adjoint import AdjointSketches
from bitpolicy.sensitivity.rounding.candidates import Candidate, candidates
from bitpolicy.sensitivity.rounding.kept_rounding import KeptRounding, write_rounded
from bitpolicy.sensitivity.rounding.rounding import announced
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches.directions import Random
from bitpolicy.sensitivity.sketches.probe_memory import ProbeMemory
from bitpolicy.sensitivity.sketches.weight_changes import WeightChanges
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

MODELS = ("stable-diffusion-v1-5", "stable-diffusion-xl-base-1.0", "DiT-XL-2-256")
FULL_STEPS = 20
FULL_VECTORS = {"stable-diffusion-xl-base-1.0": 8}  # per sample; 2 for the others
MIB = 2**20
HANDED_ON = ("steps", "pixels", "rounds", "dtype", "device", "quantizer", "formats", "probe_memory", "by_step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=128, help="height and width of the image")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--formats", default="int4,int8")
    parser.add_argument("--quantizer", choices=("rtn", "gptq"), default="rtn")
    parser.add_argument("--probe-memory", default="8GB")
    parser.add_argument("--by-step", type=int, choices=(0, 1), default=0, help="1: sketches by step, as for --split")
    parser.add_argument("--json", type=Path, default=Path("build/bench_probe.json"))
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    rows = []
    for model in args.models:
        line = [sys.executable, __file__, "--one", model]
        for name in HANDED_ON:
            line += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
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
    wanted = candidates(parse_formats(args.formats), (args.quantizer,))
    nbytes = read_bytes(args.probe_memory, "--probe-memory")
    memory = ProbeMemory(None, nbytes) if args.by_step else ProbeMemory.summing(layers, nbytes)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        quantization = Quantization(calibration=Calibration(rounded=_rounded(layers, wanted, Path(folder))))
        maker = AdjointSketches(trajectories, wanted, recompute_inside=True, quantization=quantization, memory=memory)
        plain, first, second = [], [], []
        trajectories.end(sample)  # a plain trajectory, which warms up
        for _ in range(args.rounds):
            passes = maker.sketches(sample, [Random(0), Random(1)])
            first.append(_timed(partial(next, passes), device))
            second.append(_timed(partial(list, passes), device))
            plain.append(_timed(lambda: list(trajectories.latents([sample])), device))
        changes = WeightChanges(layers, wanted, quantization=quantization, room=memory.packed)
        once = [name for name in layers if name in (memory.summed or ())]
        products = [_timed(lambda: _products(changes, layers, once[::4]), device) for _ in range(2)][-1]["seconds"]
    products *= _weights(layers, once) / max(_weights(layers, once[::4]), 1)
    steps = trajectories.steps
    plain_step = _median(plain) / steps
    step = (_median(second) - products) / steps
    full_steps, full_vectors = FULL_STEPS, FULL_VECTORS.get(args.one, 2)
    return {
        "model": args.one,
        "parameters": sum(p.numel() for p in trajectories.target.parameters()),
        "layers": len(layers),
        "summed": len(once),
        "weights_mib": sum(p.numel() * p.element_size() for p in trajectories.target.parameters()) / MIB,
        "sums_mib": 4 * _weights(layers, once) / MIB,
        "peak_mib": {
            "plain": max(each["peak_mib"] for each in plain),
            "adjoint": max(each["peak_mib"] for each in (*first, *second)),
        },
        "plain_step": plain_step,
        "adjoint_step": step,
        "products": products,
        "first_sketch": _median(first),
        "ratio": (step + products / full_steps) / plain_step,
        "steps": steps,
        "full_steps": full_steps,
        "full_vectors": full_vectors,
        "forwards_a_sample": {
            str(inside): full_steps + adjoint_forwards(full_steps, full_vectors, inside) for inside in (False, True)
        },
        "ablation_forwards_a_sample": len(layers) * 2 * full_steps,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "dtype": args.dtype,
        "pixels": args.pixels,
        "quantizer": args.quantizer,
        "formats": args.formats,
    }


def described(row: dict[str, Any]) -> str:
    """The printed line of one model."""
    counts = ", ".join(
        f"{row['ablation_forwards_a_sample'] / n:.0f}x ({'checkpointed inside' if inside == 'True' else 'plain'})"
        for inside, n in row["forwards_a_sample"].items()
    )
    return (
        f"{row['model']}, {row['pixels']} pixels, {row['quantizer']} {row['formats']}: {row['parameters'] / 1e6:.0f}M "
        f"parameters, {row['layers']} layers, {row['summed']} summed; weights {row['weights_mib']:.0f} MiB "
        f"{row['dtype']}, sums {row['sums_mib']:.0f} MiB; peak beyond what was already resident: trajectory "
        f"{row['peak_mib']['plain']:.0f} MiB, adjoint {row['peak_mib']['adjoint']:.0f} MiB; {row['plain_step']:.1f} s "
        f"per plain step, {row['adjoint_step']:.1f} s per adjoint step, {row['products']:.1f} s of products per sketch "
        f"on {row['device']}; an adjoint step is {row['ratio']:.1f} plain steps; at {row['full_steps']} steps and "
        f"{row['full_vectors']} vectors cheaper than ablation by {counts}"
    )


def _rounded(layers: dict[str, Any], wanted: Sequence[Candidate], folder: Path) -> KeptRounding:
    """Files with the codes of every candidate but `rtn`."""
    files = {}
    for name, layer in layers.items():
        weight = layer.weight.detach().half()
        specs = announced(name, weight.shape, wanted, weight.dtype)
        stored = {c.format.name: c.format.quantize(weight) for c in wanted} if specs else {}
        if specs:
            files[name] = folder / f"{name}.safetensors"
            write_rounded(files[name], specs, [(key, stored[key.format][key.suffix].cpu()) for key in specs])
    return KeptRounding(files)


def _products(changes: WeightChanges, layers: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        changes.weight_products(name, layers[name].weight.detach())


def _weights(layers: dict[str, Any], names: Sequence[str]) -> int:
    return sum(layers[name].weight.numel() for name in names)


def _median(measured: Sequence[dict[str, float]]) -> float:
    return sorted(each["seconds"] for each in measured)[len(measured) // 2]


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


def _timed(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds, and peak memory beyond what was in use at the start."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        before = _status("VmRSS")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _status("VmHWM")
    return {"seconds": clock() - start, "peak_mib": (peak - before) / MIB}


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
