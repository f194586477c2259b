"""Video pipelines that were held back while bitpolicy learned to call the others."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from toy_parts import WIDTH, clip_image_encoder, clip_image_processor, clip_text_encoder, image_vae, t5_text_encoder
from toy_recipe import picture, toy_of
from toy_schedulers import FLOW_SCHEDULERS, SCHEDULERS
from toy_tokenizers import LENGTH, clip_tokenizer, gemma_tokenizer, t5_tokenizer
from toy_video_pipelines import WAN_LATENTS, wan_parts, wan_transformer, wan_vae

_LAYERS = 3
_GUIDED = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 16}
_FRAMES = {"num_frames": 5}
_READ = {"max_sequence_length": LENGTH}


def _latte() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5_text_encoder(tokenizer),
        "vae": image_vae(),
        "transformer": diffusers.LatteTransformer3DModel(
            sample_size=8,
            num_layers=_LAYERS,
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            caption_channels=WIDTH,
            cross_attention_dim=16,
            in_channels=4,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=3,
        ),
        "scheduler": SCHEDULERS["DDIM"](),
    }


def _i2vgen_xl() -> dict[str, Any]:
    """The picture is one condition for the text's attention, and another beside the sample."""
    tokenizer = clip_tokenizer()
    return {
        "vae": image_vae(),
        "text_encoder": clip_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "image_encoder": clip_image_encoder(),
        "feature_extractor": clip_image_processor(),
        "unet": diffusers.I2VGenXLUNet(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        "scheduler": SCHEDULERS["DDIM"](),
    }


def _motif() -> dict[str, Any]:
    """A guider, which is a component, decides how often the transformer is called."""
    tokenizer = gemma_tokenizer()
    text = transformers.T5Gemma2TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        query_pre_attn_scalar=8,
        dropout_rate=0.0,
    )
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.T5Gemma2EncoderConfig(
        text_config=text.to_dict(), vision_config=vision, image_token_index=4, mm_tokens_per_image=4
    )
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": wan_vae(),
        "text_encoder": transformers.models.t5gemma2.modeling_t5gemma2.T5Gemma2Encoder(config),
        "tokenizer": tokenizer,
        "transformer": diffusers.MotifVideoTransformer3DModel(
            in_channels=2 * WAN_LATENTS + 1,
            out_channels=WAN_LATENTS,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_single_layers=_LAYERS,
            text_embed_dim=WIDTH,
            rope_axes_dim=(4, 4, 4),
        ),
        "guider": diffusers.guiders.AdaptiveProjectedGuidance(guidance_scale=3.0),
    }


def _sky_reels() -> dict[str, Any]:
    return wan_parts(wan_transformer(diffusers.SkyReelsV2Transformer3DModel))


def _any_flow() -> dict[str, Any]:
    """Its scheduler goes from any time to any other, and its transformer knows both."""
    return {
        **wan_parts(wan_transformer(diffusers.AnyFlowTransformer3DModel)),
        "scheduler": diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    }


TOYS = [
    toy_of("LattePipeline", _latte, {**_GUIDED, "video_length": 3, "clean_caption": False}),
    toy_of(  # to skip a layer of the text encoder, which is the default, fails in transformers 5
        "I2VGenXLPipeline",
        _i2vgen_xl,
        {**_GUIDED, "num_frames": 3, "clip_skip": None},
        extra={"image": picture(32)},
    ),
    toy_of(
        "MotifVideoPipeline",
        _motif,
        {"num_inference_steps": 3, "height": 16, "width": 16, **_FRAMES, **_READ},
    ),
    toy_of("SkyReelsV2Pipeline", _sky_reels, {**_GUIDED, **_FRAMES, **_READ}),
    toy_of("AnyFlowPipeline", _any_flow, {**_GUIDED, **_FRAMES, **_READ}),
]
