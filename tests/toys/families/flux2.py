"""Flux 2 with Mistral and its smaller form Klein with Qwen 3, both with pictures beside the prompt."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from toy_chats import chat_tokenizer, language_sizes, qwen3_sizes
from toy_parts import WIDTH
from toy_recipe import mask, picture, toy_of
from toy_transformer_pipelines import LAYERS, SMALL

_CALL = {**SMALL, "max_sequence_length": 48, "text_encoder_out_layers": [1, 2]}
_LONG = {**_CALL, "max_sequence_length": 256}  # the system prompt alone takes 200 tokens
_PICTURE = {"image": picture(64)}  # no smaller ones are taken
_PIXTRAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def _parts(guidance_embeds: bool) -> dict[str, Any]:
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
        ),
        "transformer": diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=LAYERS,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 4, 4, 4),
            joint_attention_dim=2 * WIDTH,
            timestep_guidance_channels=16,
            guidance_embeds=guidance_embeds,
        ),
    }


def _flux2() -> dict[str, Any]:
    tokenizer = chat_tokenizer(*_PIXTRAL)
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **language_sizes(tokenizer)},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    encoder = transformers.Mistral3ForConditionalGeneration(config)
    return {**_parts(guidance_embeds=True), "text_encoder": encoder, "tokenizer": processor}


def _klein() -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    encoder = transformers.Qwen3ForCausalLM(qwen3_sizes(tokenizer))
    return {**_parts(guidance_embeds=False), "text_encoder": encoder, "tokenizer": tokenizer}


_DISTILLED = {name: value for name, value in _CALL.items() if name != "guidance_scale"}
TOYS = [
    toy_of("Flux2Pipeline", _flux2, _LONG),
    toy_of("Flux2Pipeline-edit", _flux2, _LONG, extra=_PICTURE),
    toy_of("Flux2KleinPipeline", _klein, _CALL, extra=_PICTURE),
    toy_of(
        "Flux2KleinInpaintPipeline",
        _klein,
        {**_CALL, "strength": 0.7, "num_inference_steps": 5},
        extra={**_PICTURE, "mask_image": mask(64)},
    ),
    toy_of("Flux2KleinKVPipeline", _klein, _DISTILLED, extra=_PICTURE),
]
