"""Bria: Flux's blocks with T5 alone."""

from __future__ import annotations

from typing import Any

import diffusers
from toy_parts import WIDTH, image_vae, t5_text_encoder
from toy_recipe import toy_of
from toy_schedulers import FLOW_SCHEDULERS
from toy_tokenizers import t5_tokenizer
from toy_transformer_pipelines import LAYERS, READ, SMALL


def _parts() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "transformer": diffusers.BriaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=LAYERS,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            joint_attention_dim=WIDTH,
            pooled_projection_dim=None,
        ),
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": image_vae(shift_factor=0.0),
        "text_encoder": t5_text_encoder(tokenizer),
        "tokenizer": tokenizer,
    }


TOYS = [toy_of("BriaPipeline", _parts, {**SMALL, **READ})]
