"""ControlNets and T2I-Adapters, which steer a U-Net by a picture of depths, edges or poses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from toy_recipe import Toy, mask, picture, reproducible
from toy_unet_pipelines import stable_diffusion_parts, stable_diffusion_xl_parts

Parts = dict[str, Any]
_HINT = {"conditioning_embedding_out_channels": (8, 16)}  # halves the picture once, as the autoencoder does


def with_controlnet(parts: Parts) -> Parts:
    """The ControlNet starts from the U-Net's weights; its zero convolutions are woken like any zero weight."""
    return {**parts, "controlnet": diffusers.ControlNetModel.from_unet(parts["unet"], **_HINT)}


def _with_two_controlnets(parts: Parts) -> Parts:
    """Their residuals are added up."""
    nets = [diffusers.ControlNetModel.from_unet(parts["unet"], **_HINT) for _ in range(2)]
    return {**parts, "controlnet": nets}


def _with_union(parts: Parts) -> Parts:
    """One ControlNet for several kinds of pictures, with a transformer over them."""
    asked = inspect.signature(diffusers.ControlNetUnionModel).parameters
    like_unet = {name: value for name, value in parts["unet"].config.items() if name in asked}
    sizes = {"num_trans_channel": 16, "num_trans_head": 2, "num_trans_layer": 1, "num_proj_channel": 16}
    return {**parts, "controlnet": diffusers.ControlNetUnionModel(**like_unet, **_HINT, **sizes)}


def _with_xs(parts: Parts) -> Parts:
    """An adapter that the pipeline merges with the U-Net into one network; each looks into the other.

    The merged network, saved and loaded, has norms of as many groups in the adapter as in the U-Net: eight.
    """
    adapter = diffusers.ControlNetXSAdapter.from_unet(parts["unet"], block_out_channels=(8, 8), **_HINT)
    return {**parts, "controlnet": adapter}


def _with_adapter(parts: Parts, **options: Any) -> Parts:
    sizes = {"in_channels": 3, "channels": [16, 32], "num_res_blocks": 1, "downscale_factor": 2}
    adapter = diffusers.T2IAdapter(**{**sizes, **options})
    return {**parts, "adapter": adapter}


def _xl_adapter() -> DiffusionPipeline:
    parts = _with_adapter(stable_diffusion_xl_parts(), adapter_type="full_adapter_xl", downscale_factor=4)
    return diffusers.StableDiffusionXLAdapterPipeline(
        **{name: p for name, p in parts.items() if name != "add_watermarker"}
    )


def made(name: str, parts: Callable[[], Parts]) -> Callable[[], DiffusionPipeline]:
    """A toy's `new` for a class of diffusers."""
    return reproducible(lambda: getattr(diffusers, name)(**parts()))


_SMALL = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}
_PART_OF_THE_WAY = {**_SMALL, "strength": 0.75}
_PICTURE, _CONTROL = {"image": picture()}, {"control_image": picture().transpose(0)}
_BOTH = {**_PICTURE, **_CONTROL}
_MASKED = {**_BOTH, "mask_image": mask()}
_SD, _XL = stable_diffusion_parts, stable_diffusion_xl_parts
_MODE = {"control_mode": 0}


def _toy(name: str, parts: Callable[[], Parts], call: Parts, extra: Parts, suffix: str = "") -> Toy:
    return Toy(name + suffix, made(name, parts), call, extra=extra)


TOYS = [
    _toy(
        "StableDiffusionControlNetPipeline",
        lambda: _with_two_controlnets(_SD("DDIM")),
        _SMALL,
        {"image": [picture(), picture().transpose(0)]},
        "-two",
    ),
    _toy("StableDiffusionControlNetImg2ImgPipeline", lambda: with_controlnet(_SD("DDIM")), _PART_OF_THE_WAY, _BOTH),
    _toy("StableDiffusionControlNetInpaintPipeline", lambda: with_controlnet(_SD("DDIM")), _SMALL, _MASKED),
    _toy("StableDiffusionXLControlNetPipeline", lambda: with_controlnet(_XL()), _SMALL, _PICTURE),
    _toy("StableDiffusionXLControlNetImg2ImgPipeline", lambda: with_controlnet(_XL()), _PART_OF_THE_WAY, _BOTH),
    _toy("StableDiffusionXLControlNetInpaintPipeline", lambda: with_controlnet(_XL()), _SMALL, _MASKED),
    _toy("StableDiffusionXLControlNetUnionPipeline", lambda: _with_union(_XL()), {**_SMALL, **_MODE}, _CONTROL),
    _toy(
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        lambda: _with_union(_XL()),
        {**_PART_OF_THE_WAY, **_MODE},
        _BOTH,
    ),
    _toy(
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        lambda: _with_union(_XL()),
        {**_SMALL, **_MODE},
        _MASKED,
    ),
    _toy("StableDiffusionControlNetXSPipeline", lambda: _with_xs(_SD("DDIM", layers_per_block=2)), _SMALL, _PICTURE),
    _toy("StableDiffusionXLControlNetXSPipeline", lambda: _with_xs(_XL(layers_per_block=2)), _SMALL, _PICTURE),
    _toy("StableDiffusionAdapterPipeline", lambda: _with_adapter(_SD("DDIM")), _SMALL, _PICTURE),
    Toy("StableDiffusionXLAdapterPipeline", reproducible(_xl_adapter), _SMALL, extra=_PICTURE),
]
