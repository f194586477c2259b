"""Kandinsky 5 for videos, from text and from an image."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from toy_chats import chat_tokenizer, qwen_vl_processor, qwen_vl_text_encoder
from toy_parts import WIDTH, clip_text_encoder
from toy_recipe import Toy, picture, reproducible
from toy_tokenizers import LENGTH, clip_tokenizer

_LATENTS = 4  # channels


def _parts(conditioned: bool) -> dict[str, Any]:
    tokenizer, tokenizer_2 = chat_tokenizer(), clip_tokenizer(77)
    return {
        "tokenizer": qwen_vl_processor(tokenizer),
        "text_encoder": qwen_vl_text_encoder(tokenizer),
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": clip_text_encoder(tokenizer_2, length=77),
        "vae": diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=_LATENTS,
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            layers_per_block=1,
            mid_block_add_attention=False,
            norm_num_groups=4,
        ),
        "transformer": diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=_LATENTS,
            out_visual_dim=_LATENTS,
            in_text_dim=WIDTH,
            in_text_dim2=WIDTH,
            time_dim=16,
            model_dim=24,
            ff_dim=48,
            num_text_blocks=1,
            num_visual_blocks=3,
            axes_dims=(4, 4, 4),
            visual_cond=conditioned,
            attention_type="regular",
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def _text() -> DiffusionPipeline:
    return diffusers.Kandinsky5T2VPipeline(**_parts(False))


def _image() -> DiffusionPipeline:
    return diffusers.Kandinsky5I2VPipeline(**_parts(True))


_CALL = {
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "max_sequence_length": 36 * LENGTH,
}
TOYS = [
    Toy("Kandinsky5T2VPipeline", reproducible(_text), _CALL),
    Toy(
        "Kandinsky5I2VPipeline",
        reproducible(_image),
        {**_CALL, "num_frames": 17},
        extra={"image": picture(32)},
        refused="cannot be differentiated",
    ),
]
