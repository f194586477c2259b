"""CogView 3 Plus and CogView 4, which also takes a control image."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from toy_chats import language_sizes
from toy_parts import WIDTH, image_vae, t5_text_encoder
from toy_recipe import CONTROL, toy_of
from toy_tokenizers import gemma_tokenizer, t5_tokenizer
from toy_transformer_pipelines import LATENT, LAYERS, READ, SMALL

_SIZES: dict[str, Any] = {
    "out_channels": 4,
    "num_layers": LAYERS,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "text_embed_dim": WIDTH,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "sample_size": LATENT,
}


def _cogview3() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5_text_encoder(tokenizer),
        "vae": image_vae(),
        "transformer": diffusers.CogView3PlusTransformer2DModel(in_channels=4, pos_embed_max_size=LATENT, **_SIZES),
        "scheduler": diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", snr_shift_scale=1.0),
    }


def _cogview4(channels: int = 4) -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.GlmModel(transformers.GlmConfig(**language_sizes(tokenizer))),
        "vae": image_vae(),
        "transformer": diffusers.CogView4Transformer2DModel(in_channels=channels, **_SIZES),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    }


TOYS = [
    toy_of("CogView3PlusPipeline", _cogview3, {**SMALL, **READ}),
    toy_of("CogView4Pipeline", _cogview4, {**SMALL, **READ}),
    toy_of("CogView4ControlPipeline", lambda: _cogview4(8), {**SMALL, **READ}, extra=CONTROL),
]
