"""Assemble trained stages into a diffusers folder, and score such a folder on unseen captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    PixArtSigmaPipeline,
    SchedulerMixin,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    TextToVideoSDPipeline,
)
from PIL import Image
from scene_judge import Score, score
from scenes import Scene, unseen_captions
from small_models import WIDTH, Judge, ddim, flow, new_dit, new_mmdit, new_unet, new_video_unet
from torch import nn
from train_reference import TOKENS
from training_stage import Workshop, small_vae, text_encoder
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

CALLS: dict[str, dict[str, Any]] = {  # the call of each model when it is scored
    "unet": {"num_inference_steps": 25, "guidance_scale": 4.0},
    "dit": {
        "num_inference_steps": 25,
        "guidance_scale": 4.0,
        "use_resolution_binning": False,
        "max_sequence_length": TOKENS,
    },
    "mmdit": {"num_inference_steps": 25, "guidance_scale": 4.0, "max_sequence_length": TOKENS},
    "lcm": {"num_inference_steps": 4, "guidance_scale": 1.0},
}
MOST_BYTES = 12_000_000


def assembled(shop: Workshop, model: str) -> DiffusionPipeline:
    """The pipeline of a denoiser's EMA weights with the shared VAE and text encoder, float32."""
    builders = {"unet": _unet, "lcm": _lcm, "dit": _dit, "mmdit": _mmdit, "video": _video}
    if model not in builders:
        raise SystemExit(f"{model} has no pipeline; choose one of {', '.join(builders)}")
    return builders[model](shop)


def _unet(shop: Workshop) -> StableDiffusionPipeline:
    return _stable_diffusion(shop, shop.finished("unet", new_unet()), ddim())


def _lcm(shop: Workshop) -> StableDiffusionPipeline:
    """Call it with four steps and guidance_scale=1, because guidance is built in."""
    return _stable_diffusion(shop, shop.finished("lcm", new_unet()), LCMScheduler.from_config(ddim().config))


def _stable_diffusion(shop: Workshop, unet: nn.Module, scheduler: SchedulerMixin) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=small_vae(shop),
        text_encoder=text_encoder(shop),
        tokenizer=shop.tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _dit(shop: Workshop) -> PixArtSigmaPipeline:
    """PixArt's pipeline with our CLIP as T5. Call it with use_resolution_binning=False and max_sequence_length=16."""
    return PixArtSigmaPipeline(
        tokenizer=shop.tokenizer,
        text_encoder=text_encoder(shop),
        vae=small_vae(shop),
        transformer=shop.finished("dit", new_dit()),
        scheduler=ddim(),
    )


def _mmdit(shop: Workshop) -> StableDiffusion3Pipeline:
    """SD3's pipeline with the shared text encoder as both CLIPs; its pooled state is used unchanged.

    There is no real T5, but diffusers cannot load an SD3 folder without one. This one returns zeros, as SD3 uses for
    None. Call the pipeline with max_sequence_length=16, the number of zeros in training.
    """
    text, vae = text_encoder(shop), small_vae(shop)
    vae.register_to_config(shift_factor=0.0)
    both = CLIPTextModelWithProjection(CLIPTextConfig(**{**text.config.to_dict(), "projection_dim": WIDTH}))
    both.text_model.load_state_dict(text.state_dict())
    nn.init.eye_(both.text_projection.weight)
    silent = T5EncoderModel(
        T5Config(vocab_size=len(shop.tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    )
    nn.init.zeros_(silent.encoder.final_layer_norm.weight)
    return StableDiffusion3Pipeline(
        transformer=shop.finished("mmdit", new_mmdit()),
        scheduler=flow(),
        vae=vae,
        text_encoder=both,
        tokenizer=shop.tokenizer,
        text_encoder_2=both,
        tokenizer_2=shop.tokenizer,
        text_encoder_3=silent,
        tokenizer_3=shop.tokenizer,
    )


def _video(shop: Workshop) -> TextToVideoSDPipeline:
    both = nn.ModuleDict({"unet": new_video_unet(), "text_encoder": text_encoder(shop)})
    shop.finished("video", both)
    return TextToVideoSDPipeline(
        vae=small_vae(shop),
        text_encoder=both["text_encoder"],
        tokenizer=shop.tokenizer,
        unet=both["unet"],
        scheduler=ddim(),
    )


def write(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in float16, and refuse a folder that is too large for git."""
    pipeline.to(torch.float16).save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"{folder} has {size} bytes but at most {MOST_BYTES} are allowed; make the model smaller")


def drawings(pipeline: DiffusionPipeline, scenes: list[Scene], call: dict[str, Any], batch: int = 20) -> torch.Tensor:
    """One picture per scene with seeds 0, 1, ...; float32 in [-1, 1], shape (len(scenes), 3, 64, 64)."""
    parts = []
    for start in range(0, len(scenes), batch):
        prompts = [scene.caption for scene in scenes[start : start + batch]]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(prompts))]
        images = pipeline(prompts, generator=seeds, output_type="np", **call).images
        parts.append(torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).float() * 2 - 1)
    return torch.cat(parts)


def examine(shop: Workshop, model: str, folder: Path, count: int = 100) -> Score:
    """Draw unseen captions, save the pictures as unseen.png in the work folder, and judge them."""
    if model not in CALLS:
        raise SystemExit(f"{model} does not draw single pictures; choose one of {', '.join(CALLS)}")
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(shop.device)
    pipeline.set_progress_bar_config(disable=True)
    scenes = unseen_captions(count)
    pictures = drawings(pipeline, scenes, CALLS[model])
    sheet(pictures).save(shop.work / "unseen.png")
    return score(shop.finished("judge", Judge()), pictures.to(shop.device), scenes)


def sheet(pictures: torch.Tensor, columns: int = 10) -> Image.Image:
    """All pictures on one sheet, in rows of `columns`."""
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(list(pixels[i : i + columns]), axis=1) for i in range(0, len(pixels), columns)]
    width = rows[0].shape[1]
    return Image.fromarray(np.concatenate([r for r in rows if r.shape[1] == width], axis=0))
