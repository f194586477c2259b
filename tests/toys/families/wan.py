"""Wan, and what was made of it: videos from images, videos and poses; ChronoEdit and LucyEdit."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from PIL import Image
from toy_parts import WIDTH, clip_vision_encoder, clip_vision_processor
from toy_recipe import Toy, clip, picture, reproducible
from toy_tokenizers import LENGTH
from toy_video_pipelines import WAN_LATENTS, wan_parts, wan_transformer, wan_vae

_FRAMES = 5
_FACTOR = 2  # by which the autoencoder shrinks sides and frames
_MASKED = 2 * WAN_LATENTS + _FACTOR  # channels of the sample, a mask for the frames of each latent, and a condition


def _with_image_encoder(transformer: Any) -> dict[str, Any]:
    seeing = {"image_encoder": clip_vision_encoder(), "image_processor": clip_vision_processor()}
    return {**wan_parts(transformer), **seeing}


def _image_to_video() -> DiffusionPipeline:
    transformer = wan_transformer(in_channels=_MASKED, image_dim=WIDTH, added_kv_proj_dim=24)
    return diffusers.WanImageToVideoPipeline(**_with_image_encoder(transformer))


def _image_to_video_2_2() -> DiffusionPipeline:
    parts = wan_parts(wan_transformer(in_channels=_MASKED))
    second = wan_transformer(in_channels=_MASKED)
    return diffusers.WanImageToVideoPipeline(**parts, transformer_2=second, boundary_ratio=0.9)


def _image_to_video_5b() -> DiffusionPipeline:
    """Wan 2.2's small model: the image takes the place of the first frame, which has a timestep of its own."""
    return diffusers.WanImageToVideoPipeline(**wan_parts(), expand_timesteps=True)


def _vace() -> DiffusionPipeline:
    transformer = wan_transformer(
        diffusers.WanVACETransformer3DModel,
        vace_layers=[0, 2],
        vace_in_channels=2 * WAN_LATENTS + _FACTOR**2,
    )
    return diffusers.WanVACEPipeline(**wan_parts(transformer))


def _animate() -> DiffusionPipeline:
    transformer = wan_transformer(
        diffusers.WanAnimateTransformer3DModel,
        in_channels=2 * WAN_LATENTS + 4,  # its mask is for an autoencoder that makes one of four frames
        latent_channels=WAN_LATENTS,
        image_dim=WIDTH,
        added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=3,
    )
    return diffusers.WanAnimatePipeline(**{**_with_image_encoder(transformer), "vae": wan_vae(2)})


def _chrono_edit() -> DiffusionPipeline:
    transformer = wan_transformer(
        diffusers.ChronoEditTransformer3DModel, in_channels=_MASKED, image_dim=WIDTH, added_kv_proj_dim=24
    )
    return diffusers.ChronoEditPipeline(**_with_image_encoder(transformer))


def _lucy_edit() -> DiffusionPipeline:
    return diffusers.LucyEditPipeline(**wan_parts(wan_transformer(in_channels=2 * WAN_LATENTS)))


_SMALL = {
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "height": 16,
    "width": 16,
    "max_sequence_length": LENGTH,
}
_CALL = {**_SMALL, "num_frames": _FRAMES}
_PICTURE = {"image": picture()}
TOYS = [
    Toy("WanImageToVideoPipeline", reproducible(_image_to_video), _CALL, extra=_PICTURE),
    Toy("WanImageToVideoPipeline-2.2", reproducible(_image_to_video_2_2), _CALL, extra=_PICTURE),
    Toy("WanImageToVideoPipeline-5B", reproducible(_image_to_video_5b), _CALL, extra=_PICTURE),
    Toy(
        "WanVideoToVideoPipeline",
        reproducible(lambda: diffusers.WanVideoToVideoPipeline(**wan_parts())),
        {**_SMALL, "num_inference_steps": 4},
        extra={"video": clip(_FRAMES)},
    ),
    Toy(
        "WanVACEPipeline",
        reproducible(_vace),
        _CALL,
        extra={"video": clip(_FRAMES), "mask": [Image.new("L", (16, 16), 255 * (i > 0)) for i in range(_FRAMES)]},
    ),
    Toy(
        "WanAnimatePipeline",
        reproducible(_animate),
        {**_SMALL, "segment_frame_length": _FRAMES},
        extra={**_PICTURE, "pose_video": clip(_FRAMES), "face_video": clip(_FRAMES)},
    ),
    Toy("ChronoEditPipeline", reproducible(_chrono_edit), _CALL, extra=_PICTURE),
    Toy("LucyEditPipeline", reproducible(_lucy_edit), _CALL, extra={"video": clip(_FRAMES)}),
]
