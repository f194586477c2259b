"""CogVideoX from images, videos and control videos.

ConsisID is not here: diffusers has it with OpenCV only, and it takes the tensors of a face, which no file of requests
can hold.
"""

from __future__ import annotations

import diffusers
from diffusers import DiffusionPipeline
from toy_recipe import Toy, clip, picture, reproducible
from toy_tokenizers import LENGTH
from toy_video_pipelines import cogvideox_parts

_FRAMES = 5


def _image_to_video() -> DiffusionPipeline:
    parts = cogvideox_parts(in_channels=8, use_learned_positional_embeddings=True)
    return diffusers.CogVideoXImageToVideoPipeline(**parts)


_SMALL = {
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "height": 16,
    "width": 16,
    "max_sequence_length": LENGTH,
}
_CALL = {**_SMALL, "num_frames": _FRAMES}
TOYS = [
    Toy("CogVideoXImageToVideoPipeline", reproducible(_image_to_video), _CALL, extra={"image": picture()}),
    Toy(
        "CogVideoXVideoToVideoPipeline",
        reproducible(lambda: diffusers.CogVideoXVideoToVideoPipeline(**cogvideox_parts())),
        {**_SMALL, "num_inference_steps": 4},
        extra={"video": clip(_FRAMES)},
    ),
    Toy(
        "CogVideoXFunControlPipeline",
        reproducible(lambda: diffusers.CogVideoXFunControlPipeline(**cogvideox_parts(in_channels=8))),
        _SMALL,
        extra={"control_video": clip(_FRAMES)},
    ),
]
