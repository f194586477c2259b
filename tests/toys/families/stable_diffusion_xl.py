"""Stable Diffusion XL with pictures as input, its refiner, and Kolors."""

from __future__ import annotations

import diffusers
from diffusers import DiffusionPipeline
from toy_parts import WIDTH
from toy_recipe import Toy, mask, picture, reproducible
from toy_unet_pipelines import stable_diffusion_xl_parts


def _image_to_image() -> DiffusionPipeline:
    return diffusers.StableDiffusionXLImg2ImgPipeline(**stable_diffusion_xl_parts("DDIM"))


def _refiner() -> DiffusionPipeline:
    """Only the second text encoder, and one aesthetic score in place of the target size."""
    parts = {**stable_diffusion_xl_parts(sizes=5, cross_attention_dim=WIDTH), "text_encoder": None, "tokenizer": None}
    return diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)


def _inpaint() -> DiffusionPipeline:
    return diffusers.StableDiffusionXLInpaintPipeline(**stable_diffusion_xl_parts("DPM++ 2M", in_channels=9))


def _instruct() -> DiffusionPipeline:
    parts = stable_diffusion_xl_parts("Euler ancestral", in_channels=8)
    return diffusers.StableDiffusionXLInstructPix2PixPipeline(**parts)


_GUIDED = {"num_inference_steps": 4, "guidance_scale": 3.0}
_SMALL = {**_GUIDED, "height": 16, "width": 16}
_PICTURE = {"image": picture()}
_MASKED = {**_PICTURE, "mask_image": mask()}
TOYS = [
    Toy(
        "StableDiffusionXLImg2ImgPipeline",
        reproducible(_image_to_image),
        {**_GUIDED, "strength": 0.75},
        extra=_PICTURE,
    ),
    Toy(
        "StableDiffusionXLImg2ImgPipeline-refiner",
        reproducible(_refiner),
        {**_GUIDED, "strength": 0.75},
        extra=_PICTURE,
    ),
    Toy("StableDiffusionXLInpaintPipeline", reproducible(_inpaint), _SMALL, extra=_MASKED),
    Toy("StableDiffusionXLInstructPix2PixPipeline", reproducible(_instruct), _SMALL, extra=_PICTURE),
]
