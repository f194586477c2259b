"""How fast whole UNets are with packed weights: the bundled one, and one of Stable Diffusion 1.5's shape.

The same weights run in four ways: dequantized in ordinary layers (fp32), packed and exact, packed with sums in any
order (float), and packed with 8-bit inputs (int8; see `set_compute`). Passes alternate in one process. Prints one table
and writes JSON. The table says whether the exact output equals fp32's bit for bit, and how far the others are from it.
torch's allocator counts the most that a pass allocates, scratch included. The peak (weights plus that) is given as a
share of the peak that fp32 would have with weights of the same size. Random weights come from a fixed seed.

    python scripts/bench_unet.py --json unet.json
    python scripts/bench_unet.py --models bundled --threads 4 --formats int4
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from bench_machine import clock, description, spread
from diffusers import UNet2DConditionModel

from bitpolicy.kernels.compute.setting import resident_bytes, set_compute
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import pack_layer, packed_layers, quantizable_layers, replace_layer, unpack_layer
from bitpolicy.pipelines.loading import BUNDLED_FOLDER
from bitpolicy.policies.footprint import most_allocated


@dataclass(frozen=True)
class Model:
    """A UNet and the size of its input.

    Attributes:
        tokens: length of the text that it attends to.
    """

    name: str
    latent: int
    tokens: int
    batch: int = 1

    def build(self) -> Any:
        torch.manual_seed(0)
        if self.name == "bundled":
            return UNet2DConditionModel.from_pretrained(BUNDLED_FOLDER / "unet", dtype=torch.float32)
        with torch.device("meta"):
            unet = UNet2DConditionModel(cross_attention_dim=768)  # the defaults are Stable Diffusion 1's
        unet = unet.to_empty(device="cpu")
        for name, tensor in unet.state_dict().items():
            tensor.normal_(0, max(1, tensor[0].numel()) ** -0.5) if tensor.ndim > 1 else tensor.fill_("norm" in name)
        return unet

    def inputs(self, unet: Any) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        latents = torch.randn(self.batch, unet.config.in_channels, self.latent, self.latent)
        text = torch.randn(self.batch, self.tokens, unet.config.cross_attention_dim)
        return latents, torch.full((self.batch,), 500), text


MODELS = (Model("bundled", 16, 16), Model("bundled", 16, 16, batch=8), Model("sd1.5", 32, 77))


def variants(model: Model, format: str) -> dict[str, Any]:
    """The model in fp32 and packed; all share the layers that are neither linear nor convolutions."""
    exact = model.build().eval().requires_grad_(False)
    plain = _shell(exact)
    for name, layer in list(quantizable_layers(exact)):
        packed = pack_layer(layer, format_named(format), format_named(format).quantize(layer.weight))
        replace_layer(exact, name, packed)
        replace_layer(plain, name, unpack_layer(packed))
    others = {compute: _shell(exact) for compute in ("float", "int8")}
    for compute, other in others.items():
        set_compute(other, compute)
    return {"fp32": plain, "exact": exact, **others}


def _shell(model: Any) -> Any:
    """A copy with its own modules and the same tensors."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)


def measure(model: Model, format: str, passes: int, seconds: Any) -> list[dict[str, Any]]:
    models = variants(model, format)
    inputs = model.inputs(models["fp32"])
    outputs, times = {}, {name: [] for name in models}  # type: dict[str, torch.Tensor], dict[str, list[float]]
    for name, unet in models.items():
        outputs[name] = unet(*inputs).sample
        unet(*inputs)
    for _ in range(passes):
        for name, unet in models.items():
            start = seconds()
            unet(*inputs)
            times[name].append(seconds() - start)
    most = {name: most_allocated(inputs[0].device, partial(unet, *inputs)) for name, unet in models.items()}
    return [_row(model, format, name, unet, times, outputs, most) for name, unet in models.items()]


def _row(
    model: Model,
    format: str,
    name: str,
    unet: Any,
    times: dict[str, list[float]],
    outputs: dict[str, torch.Tensor],
    most: dict[str, int],
) -> dict[str, Any]:
    resident, truth = resident_bytes(unet), outputs["fp32"]
    return {
        "model": model.name,
        "batch": model.batch,
        "latent": model.latent,
        "format": format,
        "compute": name,
        "layers": sum(1 for _ in packed_layers(unet)),
        "ms": 1e3 * median(times[name]),
        "spread": spread(times[name]),
        "ratio": median(times["fp32"]) / median(times[name]),
        "same_bits": torch.equal(outputs[name], truth),
        "error": float((outputs[name] - truth).norm() / truth.norm()),
        "stored_mb": resident.stored / 1e6,
        "layouts_mb": resident.layouts / 1e6,
        "pass_mb": most[name] / 1e6,
        "peak_share": (resident.stored + most[name]) / (resident.stored + most["fp32"]),
    }


def shown(row: dict[str, Any]) -> str:
    name = f"{row['model']} {row['batch']}x{row['latent']}x{row['latent']}"
    error = "same bits" if row["same_bits"] else f"{row['error']:.2e}"
    return (
        f"{name:20} {row['format']:8} {row['compute']:6} {row['ms']:10.2f} {row['spread']:7.0%} {row['ratio']:7.2f}"
        f" {error:>10} {row['stored_mb']:9.1f} {row['layouts_mb']:9.1f}"
        f" {row['pass_mb']:9.1f} {row['peak_share']:6.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bundled", "sd1.5"], choices=["bundled", "sd1.5"])
    parser.add_argument("--formats", nargs="+", default=["int8", "int4"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    numbers = f"{'ms':>10} {'spread':>7} {'x fp32':>7} {'error':>10} {'MB':>9} {'+MB':>9} {'pass MB':>9} {'peak':>6}"
    print(f"{'model':20} {'format':8} {'compute':6} {numbers}")
    rows = []
    for model in (m for m in MODELS if m.name in options.models):
        passes = options.passes if model.name == "bundled" else max(3, options.passes // 3)
        for format in options.formats:
            measured = measure(model, format, passes, clock(options.threads))
            rows += measured
            print("\n".join(map(shown, measured)), flush=True)
            gc.collect()
            if options.json:  # after each model, so that an interrupted run keeps its results
                found = {"machine": description(options.threads), "rows": rows}
                options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
