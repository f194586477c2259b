"""From trained stages to a diffusers folder, and from a folder to its score on unseen captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from scene_judge import Score, score
from scenes import Scene, unseen_captions
from small_models import Judge, ddim, new_unet, new_vae
from torch import nn
from train_reference import new_text_encoder
from training_stage import Workshop

GUIDANCE, STEPS = 4.0, 25
MOST_BYTES = 12_000_000


def assemble_unet(shop: Workshop) -> StableDiffusionPipeline:
    """The EMA weights, float32."""
    both = nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(len(shop.tokenizer))})
    shop.finished("unet", both)
    return StableDiffusionPipeline(
        vae=shop.finished("vae", new_vae()),
        text_encoder=both["text_encoder"],
        tokenizer=shop.tokenizer,
        unet=both["unet"],
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write(pipeline: DiffusionPipeline, folder: Path) -> None:
    """In float16; refuses a folder that is too large for git."""
    pipeline.to(torch.float16).save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"{folder} has {size} bytes, at most {MOST_BYTES} are allowed; make the model smaller")


def drawings(pipeline: DiffusionPipeline, scenes: list[Scene], batch: int = 20) -> torch.Tensor:
    """One picture for each scene, seeds 0, 1, ...; float32 in [-1, 1], shape (len(scenes), 3, 64, 64)."""
    parts = []
    for start in range(0, len(scenes), batch):
        prompts = [scene.caption for scene in scenes[start : start + batch]]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(prompts))]
        images = pipeline(
            prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds, output_type="np"
        ).images
        parts.append(torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).float() * 2 - 1)
    return torch.cat(parts)


def examine(shop: Workshop, folder: Path, count: int = 100) -> Score:
    """Draw unseen captions, keep the drawings as unseen.png in the work folder, and judge them."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(shop.device)
    pipeline.set_progress_bar_config(disable=True)
    scenes = unseen_captions(count)
    pictures = drawings(pipeline, scenes)
    sheet(pictures).save(shop.work / "unseen.png")
    return score(shop.finished("judge", Judge()), pictures.to(shop.device), scenes)


def sheet(pictures: torch.Tensor, columns: int = 10) -> Image.Image:
    """All pictures in rows of `columns`."""
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(list(pixels[i : i + columns]), axis=1) for i in range(0, len(pixels), columns)]
    width = rows[0].shape[1]
    return Image.fromarray(np.concatenate([r for r in rows if r.shape[1] == width], axis=0))
