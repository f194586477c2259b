"""Pipelines without guidance: pixels, and the first latent diffusion models."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from families.controlnet import made
from toy_parts import WIDTH, image_vae
from toy_recipe import Toy, picture
from toy_schedulers import SCHEDULERS
from toy_tokenizers import bert_tokenizer
from toy_unet_pipelines import conditional_unet, pixel_unet

Parts = dict[str, Any]
_LDM_LENGTH = 77  # tokens, which the pipeline fixes


def _pndm() -> Parts:
    return {"unet": pixel_unet(), "scheduler": diffusers.PNDMScheduler()}


def _vq(latent_channels: int) -> diffusers.VQModel:
    return diffusers.VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        num_vq_embeddings=12,
        norm_num_groups=4,
    )


def _ldm() -> Parts:
    return {"vqvae": _vq(3), "unet": pixel_unet(), "scheduler": SCHEDULERS["DDIM"]()}


def _ldm_super_resolution() -> Parts:
    return {"vqvae": _vq(3), "unet": pixel_unet(in_channels=6, out_channels=3), "scheduler": SCHEDULERS["DDIM"]()}


def _ldm_text() -> Parts:
    tokenizer = bert_tokenizer(_LDM_LENGTH)
    config = LDMBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=_LDM_LENGTH,
        encoder_layers=2,
        encoder_ffn_dim=2 * WIDTH,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=WIDTH,
    )
    return {
        "vqvae": image_vae(),
        "bert": LDMBertModel(config),
        "tokenizer": tokenizer,
        "unet": conditional_unet(),
        "scheduler": SCHEDULERS["DDIM"](),
    }


_STEPS = {"num_inference_steps": 4}
TOYS = [
    Toy("PNDMPipeline", made("PNDMPipeline", _pndm), _STEPS, "nothing", gives_latents=False),
    Toy("LDMPipeline", made("LDMPipeline", _ldm), _STEPS, "nothing", gives_latents=False),
    Toy(
        "LDMSuperResolutionPipeline",
        made("LDMSuperResolutionPipeline", _ldm_super_resolution),
        _STEPS,
        "nothing",
        {"image": picture(32)},
        gives_latents=False,
    ),
    Toy(
        "LDMTextToImagePipeline",
        made("LDMTextToImagePipeline", _ldm_text),
        {**_STEPS, "guidance_scale": 3.0, "height": 16, "width": 16},
        gives_latents=False,
    ),
]
