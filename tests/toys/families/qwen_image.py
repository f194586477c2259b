"""Qwen-Image: images from text, images and masks, edits of one or several images, layers, and ControlNets.

The pipelines that edit scale every picture to a megapixel, whatever the call says. That would take a toy minutes, so
here they scale it to 32 x 32 pixels.
"""

from __future__ import annotations

import importlib
from typing import Any

import diffusers
from toy_chats import chat_tokenizer, qwen_vl_processor, qwen_vl_text_encoder
from toy_parts import WIDTH
from toy_recipe import CONTROL, IMAGE, MASK, PART, mask, picture, toy_of
from toy_schedulers import FLOW_SCHEDULERS
from toy_transformer_pipelines import LAYERS

_CALL: dict[str, Any] = {"num_inference_steps": 4, "true_cfg_scale": 3.0, "height": 16, "width": 16}
_NEGATIVE = {"negative_prompt": "grey"}
_GUIDED = {**_CALL, **_NEGATIVE}
_LATENTS = 4
_SIZES: dict[str, Any] = {
    "in_channels": 4 * _LATENTS,
    "out_channels": _LATENTS,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (8, 4, 4),
}
for _name in ("edit", "edit_inpaint", "edit_plus", "layered"):
    _module = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{_name}")
    _usual = _module.calculate_dimensions
    setattr(_module, "calculate_dimensions", lambda area, ratio, usual=_usual: usual(32 * 32, ratio))  # noqa: B010


def _parts(latents: int = _LATENTS, **options: Any) -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": _vae(latents),
        "text_encoder": qwen_vl_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "transformer": diffusers.QwenImageTransformer2DModel(
            num_layers=LAYERS, **_SIZES | {"in_channels": 4 * latents, "out_channels": latents}, **options
        ),
    }


def _vae(latents: int, channels: int = 3) -> diffusers.AutoencoderKLQwenImage:
    """Convolutions over frames, one frame long. It halves the sides twice."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=latents,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        input_channels=channels,
        latents_mean=[0.1] * latents,
        latents_std=[0.9] * latents,
    )


def _edit() -> dict[str, Any]:
    parts = _parts()
    return {**parts, "processor": qwen_vl_processor(parts["tokenizer"])}


def _layered() -> dict[str, Any]:
    """Images with transparency, a layer each. Latents have eight channels: the pipeline takes an image of as many
    channels as these for one that is encoded."""
    parts = _parts(8, use_additional_t_cond=True, use_layer3d_rope=True)
    return {**parts, "vae": _vae(8, channels=4), "processor": qwen_vl_processor(parts["tokenizer"])}


def _with_controlnet(extra_channels: int = 0) -> dict[str, Any]:
    controlnet = diffusers.QwenImageControlNetModel(num_layers=2, extra_condition_channels=extra_channels, **_SIZES)
    return {**_parts(), "controlnet": controlnet}


TOYS = [
    toy_of("QwenImagePipeline", _parts, _GUIDED),
    toy_of("QwenImageImg2ImgPipeline", _parts, {**_GUIDED, **PART}, extra=IMAGE),
    toy_of("QwenImageInpaintPipeline", _parts, {**_GUIDED, **PART}, extra={**IMAGE, **MASK}),
    toy_of("QwenImageEditPipeline", _edit, _GUIDED, extra=IMAGE),
    toy_of("QwenImageEditInpaintPipeline", _edit, {**_GUIDED, **PART}, extra={**IMAGE, **MASK}),
    toy_of("QwenImageEditPlusPipeline", _edit, _GUIDED, extra={"image": [picture(), picture(24)]}),
    toy_of("QwenImageControlNetPipeline", _with_controlnet, _GUIDED, extra=CONTROL),
    toy_of(
        "QwenImageControlNetInpaintPipeline",
        lambda: _with_controlnet(4),
        _GUIDED,
        extra={**CONTROL, "control_mask": mask()},
    ),
    toy_of(
        "QwenImageLayeredPipeline",
        _layered,
        {"num_inference_steps": 4, "true_cfg_scale": 3.0, "layers": 2, **_NEGATIVE},
        extra={"image": picture().convert("RGBA")},
        gives_latents=False,
    ),
]
