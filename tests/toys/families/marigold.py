"""Marigold: a Stable Diffusion U-Net that draws depths, normals or materials of the picture that it sees."""

from __future__ import annotations

from typing import Any

from families.controlnet import made
from toy_recipe import Toy, picture
from toy_unet_pipelines import UNCHECKED, stable_diffusion_parts

Parts = dict[str, Any]


def _parts(scheduler: str = "DDIM", **unet_options: Any) -> Parts:
    parts = stable_diffusion_parts(scheduler, **{"in_channels": 8, **unet_options})
    return {name: part for name, part in parts.items() if name not in UNCHECKED}


def _depth() -> Parts:
    return {**_parts("LCM"), "prediction_type": "depth", "scale_invariant": True, "shift_invariant": True}


def _normals() -> Parts:
    return {**_parts(), "prediction_type": "normals", "use_full_z_range": True}


def _intrinsics() -> Parts:
    """Two pictures at once, the albedo and the materials, side by side in the channels of the latents."""
    space = {"prediction_space": "srgb", "up_to_scale": False}
    targets = {
        "target_names": ["albedo", "material"],
        "albedo": space,
        "material": {**space, "prediction_space": "linear"},
    }
    return {**_parts(in_channels=12, out_channels=8), "prediction_type": "intrinsics", "target_properties": targets}


_CALL = {"num_inference_steps": 3, "processing_resolution": 0}
TOYS = [
    Toy(name, made(name, parts), _CALL, "nothing", {"image": picture()}, gives_latents=False)
    for name, parts in [
        ("MarigoldDepthPipeline", _depth),
        ("MarigoldNormalsPipeline", _normals),
        ("MarigoldIntrinsicsPipeline", _intrinsics),
    ]
]
