"""Cosmos, version 1 and 2, from text, images and videos.

Its pipelines refuse to run without the safety checker of the package cosmos_guardrail. Here, one that finds everything
safe stands in for it, under the same name.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from torch import nn
from toy_parts import WIDTH, t5_text_encoder
from toy_recipe import Toy, picture, reproducible
from toy_tokenizers import LENGTH, t5_tokenizer
from toy_video_pipelines import WAN_LATENTS, wan_vae

_LATENTS = 4  # channels, of both autoencoders


class CosmosSafetyChecker(ModelMixin, ConfigMixin):
    """Finds everything safe."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(1))  # a model without weights has no dtype

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def _guardrail() -> CosmosSafetyChecker:
    if "cosmos_guardrail" not in sys.modules:
        package: Any = ModuleType("cosmos_guardrail")
        package.CosmosSafetyChecker = CosmosSafetyChecker
        CosmosSafetyChecker.__module__ = "cosmos_guardrail"
        sys.modules["cosmos_guardrail"] = package
    return CosmosSafetyChecker()


def _parts(in_channels: int = _LATENTS) -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5_text_encoder(tokenizer),
        "transformer": diffusers.CosmosTransformer3DModel(
            in_channels=in_channels,
            out_channels=_LATENTS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            mlp_ratio=2,
            text_embed_dim=WIDTH,
            adaln_lora_dim=4,
            max_size=(4, 16, 16),
            rope_scale=(2.0, 1.0, 1.0),
            extra_pos_embed_type="learnable",
        ),
        "safety_checker": _guardrail(),
    }


def _version_1(kind: type[DiffusionPipeline], in_channels: int = _LATENTS) -> DiffusionPipeline:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=_LATENTS,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.EDMEulerScheduler(sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
    return kind(**_parts(in_channels), vae=vae, scheduler=scheduler)


def _version_2(kind: type[DiffusionPipeline], in_channels: int = WAN_LATENTS) -> DiffusionPipeline:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return kind(**_parts(in_channels), vae=wan_vae(2), scheduler=scheduler)


_SMALL = {
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "height": 16,
    "width": 16,
    "max_sequence_length": LENGTH,
}
_CALL = {**_SMALL, "num_frames": 5}
_REFUSED = "names cosmos_guardrail.CosmosSafetyChecker: only classes of diffusers and transformers are loaded"
_PICTURE = {"image": picture()}
TOYS = [
    Toy(
        "CosmosTextToWorldPipeline",
        reproducible(lambda: _version_1(diffusers.CosmosTextToWorldPipeline)),
        _CALL,
        refused=_REFUSED,
    ),
    Toy(
        "CosmosVideoToWorldPipeline",
        reproducible(lambda: _version_1(diffusers.CosmosVideoToWorldPipeline, _LATENTS + 1)),
        _CALL,
        extra=_PICTURE,
        refused=_REFUSED,
    ),
    Toy(
        "Cosmos2TextToImagePipeline",
        reproducible(lambda: _version_2(diffusers.Cosmos2TextToImagePipeline)),
        _SMALL,
        refused=_REFUSED,
    ),
    Toy(
        "Cosmos2VideoToWorldPipeline",
        reproducible(lambda: _version_2(diffusers.Cosmos2VideoToWorldPipeline, WAN_LATENTS + 1)),
        _CALL,
        extra=_PICTURE,
        refused=_REFUSED,
    ),
]
