"""HiDream: four text encoders, and experts that a gate chooses.

The pipeline changes every size to that of 128 x 128 latents. That would take a toy minutes, so here it is 8 x 8.
"""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from toy_chats import chat_tokenizer, language_sizes
from toy_parts import WIDTH, clip_text_encoder, image_vae, t5_text_encoder
from toy_recipe import toy_of
from toy_schedulers import FLOW_SCHEDULERS
from toy_tokenizers import clip_tokenizer, t5_tokenizer
from toy_transformer_pipelines import FLOW_VAE, LATENT, READ, SMALL

diffusers.HiDreamImagePipeline.default_sample_size = property(lambda _pipe: LATENT, lambda _pipe, _usual: None)


def _parts() -> dict[str, Any]:
    first, second, third, fourth = clip_tokenizer(), clip_tokenizer(), t5_tokenizer(), chat_tokenizer()
    llama = transformers.LlamaConfig(**language_sizes(fourth))
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": image_vae(**FLOW_VAE),
        "text_encoder": clip_text_encoder(first, transformers.CLIPTextModelWithProjection),
        "tokenizer": first,
        "text_encoder_2": clip_text_encoder(second, transformers.CLIPTextModelWithProjection),
        "tokenizer_2": second,
        "text_encoder_3": t5_text_encoder(third),
        "tokenizer_3": third,
        "text_encoder_4": transformers.LlamaForCausalLM(llama),
        "tokenizer_4": fourth,
        "transformer": diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            caption_channels=[WIDTH, WIDTH],
            text_emb_dim=2 * WIDTH,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=(0, 1, 1, 1),
        ),
    }


TOYS = [toy_of("HiDreamImagePipeline", _parts, {**SMALL, **READ})]
