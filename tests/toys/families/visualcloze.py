"""VisualCloze: Flux Fill on a grid of pictures, the last of which is to be drawn."""

from __future__ import annotations

from typing import Any

from toy_recipe import picture, toy_of
from toy_transformer_pipelines import READ, flux_parts

_CALL: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, **READ}
_GRID = {
    "task_prompt": "red, then blue",
    "content_prompt": "a heart",
    "image": [[picture(), picture()], [picture(), None]],
}


def _parts() -> dict[str, Any]:
    return {**flux_parts(extra_channels=32), "resolution": 16}


TOYS = [
    toy_of("VisualClozeGenerationPipeline", _parts, _CALL, takes="nothing", extra=_GRID),
    toy_of(  # a second loop starts from the finished pictures of the first, which has no gradients
        "VisualClozePipeline",
        _parts,
        {**_CALL, "upsampling_height": 16, "upsampling_width": 16, "upsampling_strength": 0.6},
        takes="nothing",
        extra=_GRID,
        refused="detaches its result",
    ),
]
