"""Amused: tokens of a picture, drawn at random and kept or drawn again, so that there is nothing to differentiate."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from toy_parts import WIDTH, clip_text_encoder
from toy_recipe import IMAGE, MASK, Toy, toy_of
from toy_tokenizers import clip_tokenizer

_CODES = 32
_CALL: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}


def _parts() -> dict[str, Any]:
    tokenizer = clip_tokenizer()
    return {
        "vqvae": diffusers.VQModel(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            num_vq_embeddings=_CODES,
            lookup_from_codebook=True,
        ),
        "tokenizer": tokenizer,
        "text_encoder": clip_text_encoder(tokenizer, transformers.CLIPTextModelWithProjection),
        "transformer": diffusers.UVit2DModel(
            hidden_size=16,
            cond_embed_dim=WIDTH,
            micro_cond_encode_dim=4,
            micro_cond_embed_dim=5 * 4,
            encoder_hidden_size=WIDTH,
            vocab_size=_CODES + 1,
            codebook_size=_CODES,
            in_channels=16,
            block_out_channels=16,
            num_res_blocks=1,
            block_num_heads=2,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            sample_size=8,
        ),
        "scheduler": diffusers.AmusedScheduler(mask_token_id=_CODES),
    }


def _toy(name: str, call: dict[str, Any], **options: Any) -> Toy:
    return toy_of(name, _parts, {**_CALL, **call}, gives_latents=False, refused="detaches its result", **options)


TOYS = [
    _toy("AmusedPipeline", {"height": 16, "width": 16}),
    _toy("AmusedImg2ImgPipeline", {"strength": 0.8}, extra=IMAGE),
    _toy("AmusedInpaintPipeline", {}, extra={**IMAGE, **MASK}),
]
