"""Stable Cascade and Wuerstchen: a prior draws a small latent, a decoder a larger one from it, a VQGAN the picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from families.controlnet import made
from toy_parts import WIDTH, clip_text_encoder
from toy_recipe import Toy
from toy_tokenizers import clip_tokenizer
from transformers import CLIPTextModel, CLIPTextModelWithProjection

Parts = dict[str, Any]
_SMALL_LATENT = 4  # channels of the prior's latent


def _text(kind: Any) -> Parts:
    tokenizer = clip_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": clip_text_encoder(tokenizer, kind),
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
    }


def _vqgan() -> Any:
    return PaellaVQModel(embed_dim=16, bottleneck_blocks=1, num_vq_embeddings=256)


# Stable Cascade


def _stage(**options: Any) -> diffusers.StableCascadeUNet:
    """Two levels; the second one, without attention in the decoder's first, has cross attention."""
    return diffusers.StableCascadeUNet(
        **{
            "conditioning_dim": WIDTH,
            "block_out_channels": (16, 32),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_pooled_in_channels": WIDTH,
            "dropout": (0.1, 0.1),
            "timestep_ratio_embedding_dim": 16,
            **options,
        }
    )


def _prior() -> Parts:
    net = _stage(
        in_channels=_SMALL_LATENT,
        out_channels=_SMALL_LATENT,
        switch_level=(False,),
        clip_image_in_channels=WIDTH,
        clip_text_in_channels=WIDTH,
    )
    parts = {**_text(CLIPTextModelWithProjection), "feature_extractor": None, "image_encoder": None}
    return {**parts, "prior": net}


def _decoder() -> Parts:
    plain = ["SDCascadeResBlock", "SDCascadeTimestepBlock"]
    net = _stage(
        in_channels=4,
        out_channels=4,
        num_attention_heads=(-1, 2),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(2, 1),
        block_types_per_layer=(plain, [*plain, "SDCascadeAttnBlock"]),
        effnet_in_channels=_SMALL_LATENT,
    )
    return {**_text(CLIPTextModelWithProjection), "decoder": net, "vqgan": _vqgan(), "latent_dim_scale": 2.0}


# Wuerstchen


def _wuerstchen_prior() -> Parts:
    net = WuerstchenPrior(c_in=_SMALL_LATENT, c=16, c_cond=WIDTH, c_r=8, depth=2, nhead=2)
    return {**_text(CLIPTextModel), "prior": net}


def _wuerstchen_decoder() -> Parts:
    """It divides by the sigmoid of the second half of its head; a bias keeps that near 1, and the latents small."""
    net = WuerstchenDiffNeXt(
        c_r=8,
        c_cond=WIDTH,
        c_hidden=[16, 32],
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=_SMALL_LATENT,
        clip_embd=WIDTH,
    )
    net.clf[1].bias.data.chunk(2)[1].fill_(3.0)
    return {**_text(CLIPTextModel), "decoder": net, "vqgan": _vqgan(), "latent_dim_scale": 2.0}


def _combined(decoder: Callable[[], Parts], prior: Callable[[], Parts]) -> Callable[[], Parts]:
    def parts() -> Parts:
        found = {name: part for name, part in decoder().items() if name != "latent_dim_scale"}
        return {**found, **{f"prior_{name}": part for name, part in prior().items()}}

    return parts


_GUIDED = {"num_inference_steps": 3, "guidance_scale": 3.0}
_PRIOR = {**_GUIDED, "height": 128, "width": 128}  # a latent of 4 x 4
_BOTH = {
    "height": 128,
    "width": 128,
    "num_inference_steps": 2,
    "decoder_guidance_scale": 2.0,
    "prior_num_inference_steps": 2,
    "prior_guidance_scale": 3.0,
}
_LATENT = {"image_embeddings": torch.linspace(-1, 1, _SMALL_LATENT * 16).reshape(1, _SMALL_LATENT, 4, 4)}
# diffusers 0.42 moved these models where `from_pretrained` does not look for them
_UNKNOWN = "the installed diffusers has no such class"
TOYS = [
    Toy(name, made(name, parts), call, extra=extra, gives_latents="Prior" not in name, refused=refused)
    for name, parts, call, extra, refused in [
        ("StableCascadePriorPipeline", _prior, _PRIOR, {}, ""),
        ("StableCascadeDecoderPipeline", _decoder, _GUIDED, _LATENT, _UNKNOWN),
        ("StableCascadeCombinedPipeline", _combined(_decoder, _prior), _BOTH, {}, _UNKNOWN),
        ("WuerstchenPriorPipeline", _wuerstchen_prior, _PRIOR, {}, _UNKNOWN),
        ("WuerstchenCombinedPipeline", _combined(_wuerstchen_decoder, _wuerstchen_prior), _BOTH, {}, _UNKNOWN),
    ]
]
