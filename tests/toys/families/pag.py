"""Perturbed-attention guidance: a third call of the U-Net, in which some self-attention is the identity."""

from __future__ import annotations

from families.controlnet import Parts, made, with_controlnet
from toy_recipe import Toy, mask, picture
from toy_unet_pipelines import stable_diffusion_parts, stable_diffusion_xl_parts

_SMALL = {"num_inference_steps": 4, "guidance_scale": 3.0, "pag_scale": 2.0, "height": 16, "width": 16}
_GUIDED = {"num_inference_steps": 4, "guidance_scale": 3.0, "pag_scale": 2.0, "strength": 0.75}
_PICTURE = {"image": picture()}
_MASKED = {**_PICTURE, "mask_image": mask()}
_CONTROL = {"control_image": picture().transpose(0)}


def _sd() -> Parts:
    return stable_diffusion_parts("DDIM")


def _xl() -> Parts:
    return stable_diffusion_xl_parts()


TOYS = [
    Toy(name, made(name, parts), call, extra=extra)
    for name, parts, call, extra in [
        ("StableDiffusionPAGPipeline", _sd, _SMALL, {}),
        ("StableDiffusionPAGImg2ImgPipeline", _sd, _GUIDED, _PICTURE),
        ("StableDiffusionPAGInpaintPipeline", _sd, _SMALL, _MASKED),
        ("StableDiffusionControlNetPAGPipeline", lambda: with_controlnet(_sd()), _SMALL, _PICTURE),
        (
            "StableDiffusionControlNetPAGInpaintPipeline",
            lambda: with_controlnet(_sd()),
            _SMALL,
            {**_MASKED, **_CONTROL},
        ),
        ("StableDiffusionXLPAGPipeline", _xl, _SMALL, {}),
        ("StableDiffusionXLPAGImg2ImgPipeline", _xl, _GUIDED, _PICTURE),
        ("StableDiffusionXLPAGInpaintPipeline", _xl, _SMALL, _MASKED),
        ("StableDiffusionXLControlNetPAGPipeline", lambda: with_controlnet(_xl()), _SMALL, _PICTURE),
        (
            "StableDiffusionXLControlNetPAGImg2ImgPipeline",
            lambda: with_controlnet(_xl()),
            {**_GUIDED, "height": 16, "width": 16},
            {**_PICTURE, **_CONTROL},
        ),
    ]
]
