"""Kandinsky 2.1, 2.2 and 3: a prior draws the CLIP embedding of a picture, and a U-Net paints it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from families.controlnet import made
from families.stable_diffusion import prior_transformer
from toy_parts import WIDTH, clip_image_encoder, clip_image_processor, clip_text_encoder, t5_text_encoder
from toy_recipe import Toy, mask, picture
from toy_tokenizers import clip_tokenizer, t5_tokenizer, xlm_tokenizer
from transformers import CLIPTextModelWithProjection

Parts = dict[str, Any]


def _movq() -> diffusers.VQModel:
    """An autoencoder whose decoder sees the latents at every norm. These norms have 32 groups."""
    return diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def _unet(**options: Any) -> diffusers.UNet2DConditionModel:
    """Blocks that resample in a residual layer, attention with added keys and values; it also predicts a variance."""
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "out_channels": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "encoder_hid_dim": WIDTH,
            "encoder_hid_dim_type": "image_proj",
            "addition_embed_type": "image",
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            "resnet_time_scale_shift": "scale_shift",
            **options,
        }
    )


def _scheduler() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_schedule="linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _decoder(**options: Any) -> Callable[[], Parts]:
    return lambda: {"unet": _unet(**options), "movq": _movq(), "scheduler": _scheduler()}


def _prior() -> Parts:
    """Its scheduler, made for unCLIP, predicts the embedding itself."""
    tokenizer = clip_tokenizer()
    return {
        "prior": prior_transformer(),
        "image_encoder": clip_image_encoder(),
        "text_encoder": clip_text_encoder(tokenizer, CLIPTextModelWithProjection),
        "tokenizer": tokenizer,
        "image_processor": clip_image_processor(),
        "scheduler": diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
    }


def _combined(decoder: Callable[[], Parts]) -> Callable[[], Parts]:
    return lambda: {**decoder(), **{f"prior_{name}": part for name, part in _prior().items()}}


def _first(**options: Any) -> Callable[[], Parts]:
    """Kandinsky 2.1, whose U-Net also sees the prompt, through a text encoder of its own."""

    def parts() -> Parts:
        tokenizer = xlm_tokenizer()
        config = MCLIPConfig(
            numDims=WIDTH,
            transformerDimensions=WIDTH,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=len(tokenizer),
        )
        return {"text_encoder": MultilingualCLIP(config), "tokenizer": tokenizer, **_decoder(**both)()}

    both = {"encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image", **options}
    return parts


def _third() -> Parts:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5_text_encoder(tokenizer),
        "unet": diffusers.Kandinsky3UNet(
            time_embedding_dim=16,
            groups=4,
            attention_head_dim=8,
            layers_per_block=2,
            block_out_channels=(16, 32),
            cross_attention_dim=WIDTH,
            encoder_hid_dim=WIDTH,
        ),
        "scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", steps_offset=1, clip_sample=False),
        "movq": _movq(),
    }


def _embeddings(*names: str) -> Parts:
    draw = torch.Generator().manual_seed(5)
    return {name: torch.randn(1, WIDTH, generator=draw) for name in names}


_GUIDED = {"num_inference_steps": 4, "guidance_scale": 3.0}
_SMALL = {**_GUIDED, "height": 16, "width": 16}
_PART_OF_THE_WAY = {**_SMALL, "strength": 0.75}
_WITH_PRIOR = {"prior_num_inference_steps": 2}
_PICTURE = {"image": picture()}
_MASKED = {**_PICTURE, "mask_image": mask()}
_HINT = {"hint": torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)}
_EMBEDDED = _embeddings("image_embeds", "negative_image_embeds")
_GIVE_LATENTS = [
    "KandinskyV22Pipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22InpaintPipeline",
    "KandinskyV22CombinedPipeline",
    "KandinskyV22Img2ImgCombinedPipeline",
    "KandinskyV22InpaintCombinedPipeline",
    "Kandinsky3Pipeline",
    "Kandinsky3Img2ImgPipeline",
]
TOYS = [
    Toy(name, made(name, parts), call, takes, extra, gives_latents=name in _GIVE_LATENTS)
    for name, parts, call, takes, extra in [
        ("KandinskyV22Pipeline", _decoder(), _SMALL, "nothing", _EMBEDDED),
        ("KandinskyV22Img2ImgPipeline", _decoder(), _PART_OF_THE_WAY, "nothing", {**_EMBEDDED, **_PICTURE}),
        ("KandinskyV22InpaintPipeline", _decoder(in_channels=9), _SMALL, "nothing", {**_EMBEDDED, **_MASKED}),
        (
            "KandinskyV22ControlnetPipeline",
            _decoder(in_channels=8, addition_embed_type="image_hint"),
            _SMALL,
            "nothing",
            {**_EMBEDDED, **_HINT},
        ),
        (
            "KandinskyV22ControlnetImg2ImgPipeline",
            _decoder(in_channels=8, addition_embed_type="image_hint"),
            _PART_OF_THE_WAY,
            "nothing",
            {**_EMBEDDED, **_HINT, **_PICTURE},
        ),
        ("KandinskyV22PriorPipeline", _prior, _GUIDED, "prompt", {}),
        ("KandinskyV22PriorEmb2EmbPipeline", _prior, {**_GUIDED, "strength": 0.75}, "prompt", _PICTURE),
        ("KandinskyV22CombinedPipeline", _combined(_decoder()), {**_SMALL, **_WITH_PRIOR}, "prompt", {}),
        (
            "KandinskyV22Img2ImgCombinedPipeline",
            _combined(_decoder()),
            {**_PART_OF_THE_WAY, **_WITH_PRIOR},
            "prompt",
            _PICTURE,
        ),
        (
            "KandinskyV22InpaintCombinedPipeline",
            _combined(_decoder(in_channels=9)),
            {**_SMALL, **_WITH_PRIOR},
            "prompt",
            _MASKED,
        ),
        ("KandinskyPipeline", _first(), _SMALL, "prompt", _EMBEDDED),
        ("KandinskyImg2ImgPipeline", _first(), _PART_OF_THE_WAY, "prompt", {**_EMBEDDED, **_PICTURE}),
        ("KandinskyInpaintPipeline", _first(in_channels=9), _SMALL, "prompt", {**_EMBEDDED, **_MASKED}),
        ("KandinskyPriorPipeline", _prior, _GUIDED, "prompt", {}),
        ("KandinskyCombinedPipeline", _combined(_first()), {**_SMALL, **_WITH_PRIOR}, "prompt", {}),
        (
            "KandinskyImg2ImgCombinedPipeline",
            _combined(_first()),
            {**_PART_OF_THE_WAY, **_WITH_PRIOR},
            "prompt",
            _PICTURE,
        ),
        (
            "KandinskyInpaintCombinedPipeline",
            _combined(_first(in_channels=9)),
            {**_SMALL, **_WITH_PRIOR},
            "prompt",
            _MASKED,
        ),
        ("Kandinsky3Pipeline", _third, _SMALL, "prompt", {}),
        ("Kandinsky3Img2ImgPipeline", _third, {**_GUIDED, "strength": 0.75}, "prompt", _PICTURE),
    ]
]
