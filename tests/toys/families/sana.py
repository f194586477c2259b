"""Sana: the consistency model Sprint, a ControlNet, and perturbed attention."""

from __future__ import annotations

from typing import Any

import diffusers
from toy_recipe import picture, toy_of
from toy_transformer_pipelines import SANA_CALL, SANA_SIZES, sana_parts

_SPRINT = {**SANA_CALL, "num_inference_steps": 2}
_PICTURE = picture(32)


def _sprint() -> dict[str, Any]:
    parts = sana_parts(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return {**parts, "scheduler": diffusers.SCMScheduler()}


def _with_controlnet() -> dict[str, Any]:
    return {**sana_parts(), "controlnet": diffusers.SanaControlNetModel(num_layers=2, **SANA_SIZES)}


TOYS = [
    toy_of("SanaSprintPipeline", _sprint, _SPRINT),
    toy_of("SanaSprintImg2ImgPipeline", _sprint, _SPRINT, extra={"image": _PICTURE}),
    toy_of("SanaControlNetPipeline", _with_controlnet, SANA_CALL, extra={"control_image": _PICTURE}),
    toy_of("SanaPAGPipeline", sana_parts, SANA_CALL),
]
