"""HunyuanVideo, its pipelines for images, and HunyuanVideo 1.5."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.guiders import ClassifierFreeGuidance
from toy_parts import WIDTH, clip_text_encoder, clip_vision_processor, siglip_encoder, siglip_processor, t5_text_encoder
from toy_recipe import Toy, picture, reproducible
from toy_tokenizers import LENGTH, clip_tokenizer, llama_tokenizer, qwen_tokenizer

_LATENTS = 4  # channels


def _transformer(kind: type[ModelMixin] = diffusers.HunyuanVideoTransformer3DModel, **options: Any) -> ModelMixin:
    sizes = {
        "in_channels": _LATENTS,
        "out_channels": _LATENTS,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "rope_axes_dim": (4, 4, 4),
    }
    return kind(**{**sizes, **options})


def _llama(tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_attention_heads=2,
        num_hidden_layers=3,
        pad_token_id=tokenizer.pad_token_id,
    )


def _parts(transformer: ModelMixin) -> dict[str, Any]:
    tokenizer, tokenizer_2 = llama_tokenizer(), clip_tokenizer(77)
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.LlamaModel(_llama(tokenizer)),
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": clip_text_encoder(tokenizer_2, length=77),
        "transformer": transformer,
        "vae": diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=_LATENTS,
            down_block_types=("HunyuanVideoDownBlock3D",) * 3,
            up_block_types=("HunyuanVideoUpBlock3D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def _image_to_video() -> DiffusionPipeline:
    """Its text encoder sees the image, too."""
    parts = _parts(
        _transformer(in_channels=2 * _LATENTS + 1, guidance_embeds=False, image_condition_type="latent_concat")
    )
    tokenizer = parts["tokenizer"]
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=_llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    parts["text_encoder"] = transformers.LlavaForConditionalGeneration(config)
    return diffusers.HunyuanVideoImageToVideoPipeline(**parts, image_processor=clip_vision_processor())


def _framepack() -> DiffusionPipeline:
    """Makes the video section by section, each with a loop of its own."""
    transformer = _transformer(
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=WIDTH,
        has_clean_x_embedder=True,
    )
    return diffusers.HunyuanVideoFramepackPipeline(
        **_parts(transformer), image_encoder=siglip_encoder(), feature_extractor=siglip_processor()
    )


# 1.5

_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def _parts_1_5(task: str) -> dict[str, Any]:
    """Its prompts have 1000 tokens, whatever the call says."""
    tokenizer = qwen_tokenizer(1200)
    tokenizer.chat_template = _TEMPLATE
    text = transformers.Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    )
    tokenizer_2 = transformers.ByT5Tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.Qwen2_5_VLTextModel(text),
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": t5_text_encoder(tokenizer_2),
        "transformer": diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=2 * _LATENTS + 1,
            out_channels=_LATENTS,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            image_embed_dim=WIDTH,
            rope_axes_dim=(4, 4, 4),
            target_size=16,
            task_type=task,
        ),
        "vae": diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=_LATENTS,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        "guider": ClassifierFreeGuidance(guidance_scale=3.0),
    }


def _image_to_video_1_5() -> DiffusionPipeline:
    return diffusers.HunyuanVideo15ImageToVideoPipeline(
        **_parts_1_5("i2v"), image_encoder=siglip_encoder(), feature_extractor=siglip_processor()
    )


_SIZE = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 3}
_CALL = {**_SIZE, "max_sequence_length": LENGTH, "prompt_template": {"template": "{}", "crop_start": 0}}
_SEEN = {**_CALL["prompt_template"], "image_emb_len": 4, "image_emb_start": 2, "image_emb_end": 6}
_BELOW_IDLE = "28.3%"  # with INT4 in the wide embedders of images and quoted words, which do nothing here: 28.7%
_PICTURE = {"image": picture()}
TOYS = [
    Toy(
        "HunyuanVideoPipeline",
        reproducible(lambda: diffusers.HunyuanVideoPipeline(**_parts(_transformer()))),
        {**_CALL, "true_cfg_scale": 2.0, "negative_prompt": "grey"},
    ),
    Toy(
        "HunyuanVideoImageToVideoPipeline",
        reproducible(_image_to_video),
        {**_CALL, "prompt_template": _SEEN},
        extra=_PICTURE,
    ),
    Toy(
        "HunyuanSkyreelsImageToVideoPipeline",
        reproducible(
            lambda: diffusers.HunyuanSkyreelsImageToVideoPipeline(**_parts(_transformer(in_channels=2 * _LATENTS)))
        ),
        _CALL,
        extra=_PICTURE,
    ),
    Toy("HunyuanVideoFramepackPipeline", reproducible(_framepack), {**_CALL, "latent_window_size": 2}, extra=_PICTURE),
    Toy(
        "HunyuanVideo15Pipeline",
        reproducible(lambda: diffusers.HunyuanVideo15Pipeline(**_parts_1_5("t2v"))),
        _SIZE,
        budget=_BELOW_IDLE,
    ),
    Toy(
        "HunyuanVideo15ImageToVideoPipeline",
        reproducible(_image_to_video_1_5),
        {"num_frames": 5, "num_inference_steps": 3},
        extra=_PICTURE,
        budget=_BELOW_IDLE,
    ),
]
