"""Shap-E: a prior makes the latent of a solid, which a renderer draws from several sides."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines.shap_e import ShapERenderer
from toy_parts import WIDTH, clip_text_encoder, clip_vision_encoder, clip_vision_processor
from toy_recipe import Toy, picture, reproducible
from toy_tokenizers import clip_tokenizer
from transformers import CLIPTextModelWithProjection

_TOKENS = 32  # of a latent: as many as the renderer's first layer has rows


def _parts(**options: Any) -> dict[str, Any]:
    return {
        "prior": diffusers.PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            embedding_dim=WIDTH,
            num_embeddings=_TOKENS,
            embedding_proj_dim=WIDTH,
            time_embed_dim=4 * WIDTH,
            clip_embed_dim=2 * WIDTH,
            additional_embeddings=0,
            time_embed_act_fn="gelu",
            norm_in_type="layer",
            encoder_hid_proj_type=None,
            added_emb_type=None,
            **options,
        ),
        "scheduler": diffusers.HeunDiscreteScheduler(
            beta_schedule="exp",
            num_train_timesteps=1024,
            prediction_type="sample",
            use_karras_sigmas=True,
            clip_sample=True,
            clip_sample_range=1.0,
        ),
        "shap_e_renderer": ShapERenderer(
            param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=WIDTH, d_hidden=8, n_output=12
        ),
    }


def _text() -> DiffusionPipeline:
    tokenizer = clip_tokenizer()
    return diffusers.ShapEPipeline(
        **_parts(), tokenizer=tokenizer, text_encoder=clip_text_encoder(tokenizer, CLIPTextModelWithProjection)
    )


def _image() -> DiffusionPipeline:
    return diffusers.ShapEImg2ImgPipeline(
        **_parts(embedding_proj_norm_type="layer"),
        image_encoder=clip_vision_encoder(),
        image_processor=clip_vision_processor(),
    )


_CALL = {"num_inference_steps": 3, "guidance_scale": 3.0, "frame_size": 32}
TOYS = [
    Toy("ShapEPipeline", reproducible(_text), _CALL, finished="np"),
    Toy("ShapEImg2ImgPipeline", reproducible(_image), _CALL, "nothing", {"image": picture()}, finished="np"),
]
