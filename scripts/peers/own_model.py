"""Whether effective weights tell the truth: images of a tool's own quantized model against images of a plain one.

The tool's denoiser runs in float32 inside the pipeline; then an ordinary denoiser with the effective weights does, on
the same prompts and seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn


def fp16_denoiser(model: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """The denoiser with its FP16 values, in `dtype`."""
    return UNet2DConditionModel.from_pretrained(model, subfolder="unet", dtype=torch.float16).to(dtype).eval()


def agreement(
    model: Path, work: Path, own: nn.Module, weights: Mapping[str, torch.Tensor], images: int
) -> dict[str, float | None]:
    """How far the images of the tool's own model are from those of its effective weights.

    Returns:
        `difference`, the largest absolute one of a pixel in [0, 1], and `psnr` in dB, None where they are identical.
    """
    plain = fp16_denoiser(model, torch.float32)
    plain.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float16).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    plan = json.loads((work / "samples.json").read_text())
    pictures = [_images(pipe, denoiser, plan, images) for denoiser in (own, plain)]
    error = (pictures[0] - pictures[1]).double()
    mse = error.square().mean()
    decibels = None if mse == 0 else -10 * float(mse.log10())  # strict JSON knows no infinity
    return {"difference": float(error.abs().max()), "psnr": decibels}


def _images(pipe: Any, denoiser: nn.Module, plan: dict[str, Any], count: int) -> torch.Tensor:
    """Decoded images of the first search samples, shape (count, 3, H, W), in [0, 1]."""
    pipe.unet = denoiser
    samples = plan["search"][:count]
    generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in samples]
    with torch.no_grad():
        return pipe([prompt for prompt, _ in samples], generator=generators, output_type="pt", **plan["call"]).images
