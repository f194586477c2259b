"""Stable Diffusion with another way to guide it: by attention, boxes, edits, or a safer prompt."""

from __future__ import annotations

from typing import Any

from families.controlnet import made
from toy_parts import image_vae
from toy_recipe import Toy
from toy_unet_pipelines import stable_diffusion_parts, stable_diffusion_xl_parts

Parts = dict[str, Any]


def _sd(**unet_options: Any) -> Parts:
    return stable_diffusion_parts("DDIM", **unet_options)


def _with_depth() -> Parts:
    """An autoencoder of pictures with their depths."""
    return {**_sd(), "vae": image_vae(in_channels=6, out_channels=6), "image_encoder": None}


def _gligen() -> Parts:
    """Layers that attend to boxes, for the first part of the loop."""
    return _sd(attention_type="gated", attention_head_dim=2)


_SMALL = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}
_BOXES = {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]]}
_REFUSED = {
    "StableDiffusionPanoramaPipeline": "modified by an inplace operation",
    "LEditsPPPipelineStableDiffusion": "`invert` method has to be called beforehand",
    "LEditsPPPipelineStableDiffusionXL": "`invert` method has to be called beforehand",
}
TOYS = [
    Toy(
        name,
        made(name, parts),
        call,
        extra=extra,
        gives_latents="LDM3D" not in name,
        finished="np" if "LDM3D" in name else "pt",
        refused=_REFUSED.get(name, ""),
    )
    for name, parts, call, extra in [
        ("StableDiffusionPanoramaPipeline", _sd, {**_SMALL, "width": 24}, {}),
        ("StableDiffusionSAGPipeline", _sd, {**_SMALL, "sag_scale": 0.75}, {}),
        ("StableDiffusionLDM3DPipeline", _with_depth, _SMALL, {}),
        ("StableDiffusionGLIGENPipeline", _gligen, {**_SMALL, "gligen_scheduled_sampling_beta": 0.5}, _BOXES),
        ("StableDiffusionPipelineSafe", _sd, _SMALL, {}),
        ("SemanticStableDiffusionPipeline", _sd, {**_SMALL, "edit_warmup_steps": 1}, {"editing_prompt": ["smiling"]}),
        ("LEditsPPPipelineStableDiffusion", _sd, {}, {"editing_prompt": ["smiling"]}),
        ("LEditsPPPipelineStableDiffusionXL", lambda: stable_diffusion_xl_parts("DDIM"), {}, {}),
    ]
]
