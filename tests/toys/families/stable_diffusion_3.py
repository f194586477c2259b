"""Stable Diffusion 3: images from images and masks, ControlNets, and perturbed attention."""

from __future__ import annotations

from typing import Any

import diffusers
from toy_recipe import CONTROL, IMAGE, MASK, PART, mask, toy_of
from toy_transformer_pipelines import READ, SD3_SIZES, SMALL, sd3_parts

_CALL = {**SMALL, **READ}


def _with_controlnet() -> dict[str, Any]:
    return {**sd3_parts(), "controlnet": diffusers.SD3ControlNetModel(num_layers=2, **SD3_SIZES)}


def _inpainting() -> dict[str, Any]:
    """The ControlNet reads a mask beside the image."""
    controlnet = diffusers.SD3ControlNetModel(num_layers=2, extra_conditioning_channels=1, **SD3_SIZES)
    return {**sd3_parts(), "controlnet": controlnet}


TOYS = [
    toy_of("StableDiffusion3Img2ImgPipeline", sd3_parts, {**_CALL, **PART}, extra=IMAGE),
    toy_of("StableDiffusion3InpaintPipeline", lambda: sd3_parts(16), {**_CALL, **PART}, extra={**IMAGE, **MASK}),
    toy_of("StableDiffusion3ControlNetPipeline", _with_controlnet, _CALL, extra=CONTROL),
    toy_of(
        "StableDiffusion3ControlNetInpaintingPipeline", _inpainting, SMALL, extra={**CONTROL, "control_mask": mask()}
    ),
    toy_of("StableDiffusion3PAGPipeline", sd3_parts, _CALL),
    toy_of("StableDiffusion3PAGImg2ImgPipeline", sd3_parts, {**_CALL, **PART}, extra=IMAGE),
]
