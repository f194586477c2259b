"""Chroma: Flux's blocks with modulations from a network of their own, and a mask of the prompt."""

from __future__ import annotations

from typing import Any

import diffusers
from toy_parts import WIDTH, image_vae, t5_text_encoder
from toy_recipe import IMAGE, MASK, PART, toy_of
from toy_schedulers import FLOW_SCHEDULERS
from toy_tokenizers import t5_tokenizer
from toy_transformer_pipelines import FLOW_VAE, LAYERS, READ, SMALL

_CALL = {**SMALL, **READ}


def _parts() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": image_vae(**FLOW_VAE),
        "text_encoder": t5_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "transformer": diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=LAYERS,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            joint_attention_dim=WIDTH,
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=2,
        ),
    }


TOYS = [
    toy_of("ChromaPipeline", _parts, _CALL),
    toy_of("ChromaImg2ImgPipeline", _parts, {**_CALL, **PART}, extra=IMAGE),
    toy_of(  # the pipeline reads guidance_embeds, which the config of Chroma's transformer has not
        "ChromaInpaintPipeline", _parts, {**_CALL, **PART}, extra={**IMAGE, **MASK}, refused="guidance_embeds"
    ),
]
