"""Z-Image: one stream of text, image and, in Omni, what a vision encoder sees."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from toy_chats import chat_tokenizer, qwen3_sizes
from toy_parts import WIDTH, image_vae
from toy_recipe import CONTROL, IMAGE, MASK, PART, picture, toy_of
from toy_schedulers import FLOW_SCHEDULERS
from toy_transformer_pipelines import FLOW_VAE, LAYERS, SMALL

_CALL = {**SMALL, "max_sequence_length": 48}
_BLOCKS: dict[str, Any] = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def _parts(**options: Any) -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": image_vae(**FLOW_VAE),
        "text_encoder": transformers.Qwen3Model(qwen3_sizes(tokenizer)),
        "tokenizer": tokenizer,
        "transformer": diffusers.ZImageTransformer2DModel(
            in_channels=4,
            n_layers=LAYERS,
            cap_feat_dim=WIDTH,
            axes_dims=[8, 4, 4],
            axes_lens=[512, 32, 32],
            **_BLOCKS,
            **options,
        ),
    }


def _with_controlnet(channels: int) -> dict[str, Any]:
    controlnet = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 2],
        control_refiner_layers_places=[0],
        add_control_noise_refiner="control_noise_refiner",
        control_in_dim=channels,
        **_BLOCKS,
    )
    return {**_parts(), "controlnet": controlnet}


def _omni() -> dict[str, Any]:
    vision = transformers.Siglip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_patches=16,
        patch_size=8,
    )
    return {
        **_parts(siglip_feat_dim=WIDTH),
        "siglip": transformers.Siglip2VisionModel(vision),
        "siglip_processor": transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    }


TOYS = [
    toy_of("ZImagePipeline", _parts, _CALL),
    toy_of("ZImageImg2ImgPipeline", _parts, {**_CALL, **PART}, extra=IMAGE),
    toy_of("ZImageInpaintPipeline", _parts, {**_CALL, **PART}, extra={**IMAGE, **MASK}),
    toy_of("ZImageControlNetPipeline", lambda: _with_controlnet(4), _CALL, extra=CONTROL),
    toy_of("ZImageControlNetInpaintPipeline", lambda: _with_controlnet(9), _CALL, extra={**IMAGE, **MASK, **CONTROL}),
    toy_of(  # the pipeline makes bfloat16 of its pictures, whatever the models take
        "ZImageOmniPipeline", _omni, _CALL, extra={"image": picture(64)}, refused="BFloat16"
    ),
]
