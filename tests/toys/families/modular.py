"""Modular pipelines: blocks that diffusers puts together, without the components that they would load."""

from __future__ import annotations

from toy_recipe import toy_of

_NAMES = (
    "Anima",
    "Cosmos3Distilled",
    "Cosmos3Omni",
    "Flux",
    "Flux2",
    "Flux2Klein",
    "Flux2KleinBase",
    "FluxKontext",
    "Helios",
    "HeliosPyramid",
    "HeliosPyramidDistilled",
    "HunyuanVideo15",
    "LTX",
    "LTX2",
    "LTX25",
    "MiniMaxH3",
    "MiniMaxMusic3",
    "QwenImage",
    "QwenImageEdit",
    "QwenImageEditPlus",
    "QwenImageLayered",
    "StableDiffusion3",
    "StableDiffusionXL",
    "Wan",
    "Wan22",
    "Wan22Image2Video",
    "WanAnimate2",
    "WanAnimate2Distilled",
    "WanImage2Video",
    "ZImage",
)
TOYS = [
    toy_of(f"{name}ModularPipeline", dict, {}, refused="is a modular pipeline, whose blocks turn gradients off")
    for name in _NAMES
]
