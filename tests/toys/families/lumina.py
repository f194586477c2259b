"""Lumina, with cross attention, and Lumina 2, with one stream of text and image."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from toy_chats import gemma2_text_encoder, language_sizes
from toy_parts import WIDTH, image_vae
from toy_recipe import toy_of
from toy_schedulers import FLOW_SCHEDULERS
from toy_tokenizers import gemma_tokenizer
from toy_transformer_pipelines import FLOW_VAE, LATENT, LAYERS, READ, SMALL

_CALL = {**SMALL, **READ}
_SIZES: dict[str, Any] = {
    "sample_size": LATENT,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 16,
    "num_layers": LAYERS,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 16,
}


def _lumina() -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    return {
        "transformer": diffusers.LuminaNextDiT2DModel(cross_attention_dim=WIDTH, **_SIZES),
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": image_vae(),
        "text_encoder": transformers.GemmaForCausalLM(transformers.GemmaConfig(**language_sizes(tokenizer))),
        "tokenizer": tokenizer,
    }


def _lumina2() -> dict[str, Any]:
    """The system prompt takes 170 tokens of the usual 256."""
    tokenizer = gemma_tokenizer(256)
    return {
        "transformer": diffusers.Lumina2Transformer2DModel(
            cap_feat_dim=WIDTH, axes_dim_rope=(4, 2, 2), axes_lens=(300, 64, 64), num_refiner_layers=1, **_SIZES
        ),
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": image_vae(**FLOW_VAE),
        "text_encoder": gemma2_text_encoder(tokenizer),
        "tokenizer": tokenizer,
    }


TOYS = [
    toy_of("LuminaPipeline", _lumina, {**_CALL, "clean_caption": False}),
    toy_of("Lumina2Pipeline", _lumina2, SMALL),
]
