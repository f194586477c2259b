"""Transformers that make videos, a class or two each: Mochi, Allegro, SANA-Video."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from toy_parts import WIDTH, t5_text_encoder
from toy_recipe import Toy, reproducible
from toy_tokenizers import LENGTH, gemma_tokenizer, t5_tokenizer
from toy_video_pipelines import WAN_LATENTS, wan_vae

_LAYERS = 3


def _mochi() -> DiffusionPipeline:
    """Its autoencoder has norms of 32 groups, and shrinks sides by 8 and frames by 6."""
    tokenizer = t5_tokenizer()
    return diffusers.MochiPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_text_encoder(tokenizer),
        vae=diffusers.AutoencoderKLMochi(
            latent_channels=12,
            out_channels=3,
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
        ),
        transformer=diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=_LAYERS,
            pooled_projection_dim=WIDTH,
            in_channels=12,
            text_embed_dim=WIDTH,
            time_embed_dim=4,
            max_sequence_length=LENGTH,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _allegro() -> DiffusionPipeline:
    """Its autoencoder decodes tiles only, which overlap by 120 and 80 pixels and 8 frames."""
    tokenizer = t5_tokenizer()
    pipe = diffusers.AllegroPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_text_encoder(tokenizer, 24),
        vae=diffusers.AutoencoderKLAllegro(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("AllegroDownBlock3D",) * 4,
            up_block_types=("AllegroUpBlock3D",) * 4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
            sample_size=128,
        ),
        transformer=diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=_LAYERS,
            cross_attention_dim=24,
            caption_channels=24,
            sample_width=16,
            sample_height=16,
            sample_frames=6,
        ),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    )
    pipe.vae.enable_tiling()
    return pipe


def _sana_parts() -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    text = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.Gemma2Model(text),
        "vae": wan_vae(),
        "transformer": diffusers.SanaVideoTransformer3DModel(
            in_channels=WAN_LATENTS,
            out_channels=WAN_LATENTS,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=_LAYERS,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=WIDTH,
            sample_size=8,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


_SMALL = {
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "height": 16,
    "width": 16,
    "max_sequence_length": LENGTH,
}
_SANA = {
    **_SMALL,
    "height": 32,
    "width": 32,
    "frames": 5,
    "complex_human_instruction": [],
    "use_resolution_binning": False,
}
TOYS = [
    Toy("MochiPipeline", reproducible(_mochi), {**_SMALL, "num_frames": 7}),
    Toy("AllegroPipeline", reproducible(_allegro), {**_SMALL, "height": 128, "width": 128, "num_frames": 24}),
    Toy("SanaVideoPipeline", reproducible(lambda: diffusers.SanaVideoPipeline(**_sana_parts())), _SANA),
]
