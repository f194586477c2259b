"""Flux: images from images, masks and references, control images, and ControlNets."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from toy_parts import WIDTH
from toy_recipe import CONTROL, IMAGE, MASK, PART, picture, toy_of
from toy_transformer_pipelines import FLUX_SIZES, READ, SMALL, flux_parts

_CALL = {**SMALL, **READ}
_KONTEXT = {**_CALL, "_auto_resize": False, "max_area": 256}


def _control() -> dict[str, Any]:
    return flux_parts(extra_channels=16)


def _fill() -> dict[str, Any]:
    return flux_parts(extra_channels=32)


def _kontext() -> dict[str, Any]:
    """The autoencoder has no attention, because the command line tries calls at the usual size, a megapixel."""
    return flux_parts(mid_block_add_attention=False)


def _with_controlnet() -> dict[str, Any]:
    controlnet = diffusers.FluxControlNetModel(in_channels=16, num_layers=2, num_single_layers=2, **FLUX_SIZES)
    return {**flux_parts(), "controlnet": controlnet}


def _redux() -> dict[str, Any]:
    """It makes a prompt of a picture, and draws nothing."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return {
        "image_encoder": transformers.SiglipVisionModel(vision),
        "feature_extractor": transformers.SiglipImageProcessor(size={"height": 8, "width": 8}),
        "image_embedder": ReduxImageEncoder(redux_dim=WIDTH, txt_in_features=WIDTH),
    }


TOYS = [
    toy_of("FluxPriorReduxPipeline", _redux, {}, extra=IMAGE, refused="has no component named unet or transformer"),
    toy_of("FluxImg2ImgPipeline", flux_parts, {**_CALL, **PART}, extra=IMAGE),
    toy_of("FluxInpaintPipeline", flux_parts, {**_CALL, **PART}, extra={**IMAGE, **MASK}),
    toy_of("FluxFillPipeline", _fill, _CALL, extra={**IMAGE, **MASK}),
    toy_of("FluxKontextPipeline", _kontext, _KONTEXT, extra=IMAGE),
    toy_of(
        "FluxKontextInpaintPipeline",
        _kontext,
        {**_KONTEXT, **PART},
        extra={**IMAGE, **MASK, "image_reference": picture()},
    ),
    toy_of("FluxControlPipeline", _control, _CALL, extra=CONTROL),
    toy_of("FluxControlImg2ImgPipeline", _control, {**_CALL, **PART}, extra={**IMAGE, **CONTROL}),
    toy_of("FluxControlInpaintPipeline", _control, {**_CALL, **PART}, extra={**IMAGE, **MASK, **CONTROL}),
    toy_of("FluxControlNetPipeline", _with_controlnet, _CALL, extra=CONTROL),
    toy_of("FluxControlNetImg2ImgPipeline", _with_controlnet, {**_CALL, **PART}, extra={**IMAGE, **CONTROL}),
    toy_of("FluxControlNetInpaintPipeline", _with_controlnet, {**_CALL, **PART}, extra={**IMAGE, **MASK, **CONTROL}),
]
