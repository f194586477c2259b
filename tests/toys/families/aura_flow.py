"""AuraFlow: blocks for text and image, then blocks for both at once."""

from __future__ import annotations

from typing import Any

import diffusers
from toy_parts import WIDTH, image_vae, umt5_text_encoder
from toy_recipe import toy_of
from toy_schedulers import FLOW_SCHEDULERS
from toy_tokenizers import t5_tokenizer
from toy_transformer_pipelines import LATENT, READ, SMALL


def _parts() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": umt5_text_encoder(tokenizer),
        "vae": image_vae(),
        "transformer": diffusers.AuraFlowTransformer2DModel(
            sample_size=LATENT,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            caption_projection_dim=16,
            joint_attention_dim=WIDTH,
            pos_embed_max_size=64,
        ),
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
    }


TOYS = [toy_of("AuraFlowPipeline", _parts, {**SMALL, **READ})]
