"""Hunyuan Image 2.1, guided by an object of its own, and its refiner, which is distilled."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.guiders import AdaptiveProjectedMixGuidance
from toy_chats import chat_tokenizer, qwen_vl_text_encoder
from toy_parts import WIDTH
from toy_recipe import IMAGE, toy_of
from toy_transformer_pipelines import LAYERS

_GLYPHS = {"negative_prompt": 'the word "red"'}  # the second text encoder reads what is in quotation marks
_CALL: dict[str, Any] = {"num_inference_steps": 4, "height": 16, "width": 16}
_SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_single_layers": LAYERS,
    "num_refiner_layers": 1,
    "text_embed_dim": WIDTH,
}


def _parts() -> dict[str, Any]:
    tokenizer, bytes_tokenizer = chat_tokenizer(), transformers.ByT5Tokenizer()
    glyphs = transformers.T5Config(
        vocab_size=len(bytes_tokenizer),
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        "vae": diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            scaling_factor=0.5,
            spatial_compression_ratio=2,
            sample_size=16,
        ),
        "text_encoder": qwen_vl_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "text_encoder_2": transformers.T5EncoderModel(glyphs),
        "tokenizer_2": bytes_tokenizer,
        "transformer": diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            patch_size=(1, 1),
            rope_axes_dim=(4, 4),
            text_embed_2_dim=WIDTH,
            **_SIZES,
        ),
        "guider": AdaptiveProjectedMixGuidance(guidance_scale=3.0),
    }


def _refiner() -> dict[str, Any]:
    """Two frames of the autoencoder's latents, which it takes for one of twice the channels."""
    tokenizer = chat_tokenizer()
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0),
        "vae": diffusers.AutoencoderKLHunyuanImageRefiner(
            latent_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            spatial_compression_ratio=2,
            temporal_compression_ratio=2,
        ),
        "text_encoder": qwen_vl_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "transformer": diffusers.HunyuanImageTransformer2DModel(
            in_channels=16,
            out_channels=8,
            patch_size=(1, 1, 1),
            rope_axes_dim=(2, 2, 4),
            guidance_embeds=True,
            **_SIZES,
        ),
    }


TOYS = [
    toy_of("HunyuanImagePipeline", _parts, {**_CALL, **_GLYPHS}),
    toy_of("HunyuanImageRefinerPipeline", _refiner, _CALL, extra=IMAGE),
]
