"""The denoiser that all rivals get, its recorded calls, and a check of the effective weights.

The check runs a tool's denoiser in float32 inside the pipeline, and then an ordinary denoiser with the effective
weights, on the same prompts and seeds. Every tool's script imports this module, so it needs only torch, diffusers and
safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

DENOISERS = ("unet", "transformer")
OUTPUT = "output"  # the denoiser's output in a recorded call; all other tensors are arguments of its forward


def denoiser_name(model: Path) -> str:
    """The name of the component of a pipeline folder that is quantized."""
    parts = json.loads((model / "model_index.json").read_text())
    return next(name for name in DENOISERS if name in parts)


def fp16_denoiser(model: Path, dtype: torch.dtype) -> Any:
    """The denoiser with its FP16 values, in `dtype`."""
    name = denoiser_name(model)
    kind = getattr(diffusers, json.loads((model / "model_index.json").read_text())[name][1])
    return kind.from_pretrained(model, subfolder=name, dtype=torch.float16).to(dtype).eval()


def call(denoiser: nn.Module, recorded: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The denoiser's output for recorded calls."""
    arguments = {name: tensor for name, tensor in recorded.items() if name != OUTPUT}
    return denoiser(**arguments, return_dict=False)[0]


def kept_layers(work: Path) -> list[str]:
    """The layers that people usually leave unquantized: timestep embedding, input stem and output head."""
    return json.loads((work / "samples.json").read_text())["kept"]


def agreement(
    model: Path, work: Path, own: nn.Module, weights: Mapping[str, torch.Tensor], images: int
) -> dict[str, float | None]:
    """How far the images of the tool's own model are from those of its effective weights.

    Returns:
        `difference`, the largest absolute difference of a pixel in [0, 1], and `psnr` in dB, None if identical.
    """
    plain = fp16_denoiser(model, torch.float32)
    plain.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float16).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    plan = json.loads((work / "samples.json").read_text())
    pictures = []
    for denoiser in (own, plain):
        setattr(pipe, denoiser_name(model), denoiser)
        pictures.append(_images(pipe, plan, images))
    error = (pictures[0] - pictures[1]).double()
    mse = error.square().mean()
    decibels = None if mse == 0 else -10 * float(mse.log10())  # strict JSON has no infinity
    return {"difference": float(error.abs().max()), "psnr": decibels}


def _images(pipe: Any, plan: dict[str, Any], count: int) -> torch.Tensor:
    """Decoded images of the first search samples, shape (count, 3, H, W), in [0, 1]."""
    samples = plan["search"][:count]
    generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in samples]
    with torch.no_grad():
        return pipe([prompt for prompt, _ in samples], generator=generators, output_type="pt", **plan["call"]).images
