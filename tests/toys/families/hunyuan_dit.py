"""Hunyuan-DiT with a ControlNet and with perturbed attention."""

from __future__ import annotations

from typing import Any

import diffusers
from toy_recipe import picture, toy_of
from toy_transformer_pipelines import HUNYUAN_DIT_CALL, HUNYUAN_DIT_SIZES, hunyuan_dit_parts


def _with_controlnet() -> dict[str, Any]:
    controlnet = diffusers.HunyuanDiT2DControlNetModel(
        transformer_num_layers=4, activation_fn="gelu-approximate", **HUNYUAN_DIT_SIZES
    )
    return {**hunyuan_dit_parts(), "controlnet": controlnet}


TOYS = [
    toy_of("HunyuanDiTControlNetPipeline", _with_controlnet, HUNYUAN_DIT_CALL, extra={"control_image": picture(64)}),
    toy_of("HunyuanDiTPAGPipeline", hunyuan_dit_parts, HUNYUAN_DIT_CALL),
]
