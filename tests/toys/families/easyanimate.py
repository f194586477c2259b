"""EasyAnimate, from text, to fill in a part of a video, and along a control video."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from toy_chats import chat_tokenizer, qwen_vl_text_encoder
from toy_parts import WIDTH
from toy_recipe import Toy, reproducible
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

_LATENTS = 4  # channels
_FRAMES = 5


def _parts(in_channels: int = _LATENTS, **options: Any) -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    like = qwen_vl_text_encoder(tokenizer).config
    vision = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    text = {**like.text_config.to_dict(), "model_type": "qwen2_vl_text"}
    return {
        "tokenizer": tokenizer,
        "text_encoder": Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)),
        "vae": diffusers.AutoencoderKLMagvit(
            latent_channels=_LATENTS,
            down_block_types=("SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"),
            up_block_types=("SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"),
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        ),
        "transformer": diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=in_channels,
            out_channels=_LATENTS,
            time_embed_dim=8,
            text_embed_dim=WIDTH,
            num_layers=3,
            patch_size=2,
            sample_width=8,
            sample_height=8,
            **options,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


def _inpaint() -> DiffusionPipeline:
    """Its transformer also sees a mask of one channel and the masked video."""
    return diffusers.EasyAnimateInpaintPipeline(**_parts(2 * _LATENTS + 1, resize_inpaint_mask_directly=True))


def _control() -> DiffusionPipeline:
    return diffusers.EasyAnimateControlPipeline(**_parts(2 * _LATENTS))


def _video(channels: int) -> torch.Tensor:
    """In [0, 1], shape (1, channels, frames, 16, 16)."""
    return torch.rand(1, channels, _FRAMES, 16, 16, generator=torch.Generator().manual_seed(channels))


_CALL = {
    "negative_prompt": "grey",
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "height": 16,
    "width": 16,
    "num_frames": _FRAMES,
}
TOYS = [
    Toy("EasyAnimatePipeline", reproducible(lambda: diffusers.EasyAnimatePipeline(**_parts())), _CALL),
    Toy(
        "EasyAnimateInpaintPipeline",
        reproducible(_inpaint),
        _CALL,
        extra={"video": _video(3), "mask_video": 255 * _video(1).round()},
        refused="diffusers' own call fails",
    ),
    Toy(
        "EasyAnimateControlPipeline",
        reproducible(_control),
        _CALL,
        extra={"control_video": _video(3)},
        refused="diffusers' own call fails",
    ),
]
