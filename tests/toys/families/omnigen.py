"""OmniGen: a language model that reads the prompt and is the denoiser too."""

from __future__ import annotations

from typing import Any

import diffusers
from toy_parts import image_vae
from toy_recipe import toy_of
from toy_tokenizers import gemma_tokenizer
from toy_transformer_pipelines import GUIDED, LAYERS


def _parts() -> dict[str, Any]:
    tokenizer = gemma_tokenizer(1000)
    return {
        "transformer": diffusers.OmniGenTransformer2DModel(
            in_channels=4,
            hidden_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            num_layers=LAYERS,
            pad_token_id=tokenizer.pad_token_id,
            vocab_size=len(tokenizer),
            time_step_dim=16,
            pos_embed_max_size=32,
            rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        "vae": image_vae((4, 4, 8, 8)),
        "tokenizer": tokenizer,
    }


TOYS = [toy_of("OmniGenPipeline", _parts, {**GUIDED, "height": 64, "width": 64})]
