"""LTX-Video, from text, images and videos."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from toy_parts import WIDTH, t5_text_encoder
from toy_recipe import Toy, picture, reproducible
from toy_tokenizers import LENGTH, t5_tokenizer

_LATENTS = 8  # channels


def _vae() -> diffusers.AutoencoderKLLTXVideo:
    """Makes 4 x 4 pixels of 4 frames one."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=_LATENTS,
        block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False),
        decoder_spatio_temporal_scaling=(True, True, False),
        decoder_inject_noise=(False, False, False, False),
        upsample_residual=(False, False, False),
        upsample_factor=(1, 1, 1),
        downsample_type=("conv", "conv", "conv"),
        patch_size=1,
    )


def _parts() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5_text_encoder(tokenizer),
        "vae": _vae(),
        "transformer": diffusers.LTXVideoTransformer3DModel(
            in_channels=_LATENTS,
            out_channels=_LATENTS,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=3,
            caption_channels=WIDTH,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


def _new(kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    return kind(**_parts())


_CALL = {
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "max_sequence_length": LENGTH,
}
_PICTURE = {"image": picture(32)}
TOYS = [
    Toy("LTXPipeline", reproducible(lambda: _new(diffusers.LTXPipeline)), _CALL),
    Toy(
        "LTXImageToVideoPipeline", reproducible(lambda: _new(diffusers.LTXImageToVideoPipeline)), _CALL, extra=_PICTURE
    ),
    Toy("LTXConditionPipeline", reproducible(lambda: _new(diffusers.LTXConditionPipeline)), _CALL, extra=_PICTURE),
    Toy(
        "LTXI2VLongMultiPromptPipeline",
        reproducible(lambda: _new(diffusers.LTXI2VLongMultiPromptPipeline)),
        _CALL,
    ),
]
