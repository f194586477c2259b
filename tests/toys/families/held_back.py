"""Image pipelines that were held back while bitpolicy learned to call the others: the rest of these is in
`held_back_video`."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from torch import nn
from toy_chats import (
    chat_tokenizer,
    language_sizes,
    qwen3_sizes,
    qwen3_vl_processor,
    qwen3_vl_sizes,
    qwen_vl_processor,
    qwen_vl_text_encoder,
)
from toy_parts import WIDTH, image_vae
from toy_recipe import toy_of
from toy_schedulers import FLOW_SCHEDULERS
from toy_transformer_pipelines import FLOW_VAE, GUIDED, LAYERS, SMALL

_LATENTS = 4  # channels
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
_AXES = (4, 6, 6)  # of a head
_LARGER = {**GUIDED, "height": 32, "width": 32}
_NEGATIVE = {"negative_prompt": "grey"}
_LONG = {"max_sequence_length": 256}  # the system prompt alone takes more than 100 tokens


def _krea2() -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": _qwen_vae(),
        "text_encoder": transformers.Qwen3VLModel(qwen3_vl_sizes(tokenizer)),
        "tokenizer": tokenizer,
        "transformer": diffusers.Krea2Transformer2DModel(
            in_channels=4 * _LATENTS,
            num_layers=LAYERS,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=8,
            text_hidden_dim=WIDTH,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=_AXES,
            **_HEADS,
        ),
        "text_encoder_select_layers": (0, 1, 2),
    }


def _qwen_vae() -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=_LATENTS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1] * _LATENTS,
        latents_std=[0.9] * _LATENTS,
    )


def _ovis() -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": image_vae(**FLOW_VAE),
        "text_encoder": transformers.Qwen3Model(qwen3_sizes(tokenizer)),
        "tokenizer": tokenizer,
        "transformer": diffusers.OvisImageTransformer2DModel(
            in_channels=4 * _LATENTS,
            out_channels=4 * _LATENTS,
            num_layers=2,
            num_single_layers=LAYERS,
            joint_attention_dim=WIDTH,
            axes_dims_rope=_AXES,
            **_HEADS,
        ),
    }


def _longcat() -> dict[str, Any]:
    """The pipeline fixes 16 channels of the latent, and 512 tokens of a prompt."""
    tokenizer = chat_tokenizer()
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": image_vae(latent_channels=16, **FLOW_VAE),
        "text_encoder": qwen_vl_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "text_processor": qwen_vl_processor(tokenizer),
        "transformer": diffusers.LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=LAYERS,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=list(_AXES),
            **_HEADS,
        ),
    }


def _flux2_vae() -> diffusers.AutoencoderKLFlux2:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=_LATENTS,
        layers_per_block=1,
        norm_num_groups=4,
    )


def _ernie() -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    vision = {
        "model_type": "pixtral",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    text = {"model_type": "mistral", **language_sizes(tokenizer)}
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": _flux2_vae(),
        "text_encoder": transformers.Mistral3Model(transformers.Mistral3Config(text_config=text, vision_config=vision)),
        "tokenizer": tokenizer,
        "transformer": diffusers.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=LAYERS,
            ffn_hidden_size=64,
            in_channels=4 * _LATENTS,
            out_channels=4 * _LATENTS,
            text_in_dim=WIDTH,
            rope_axes_dim=_AXES,
        ),
    }


def _ideogram4() -> dict[str, Any]:
    """Two transformers, of which one sees no prompt. The pipeline reads 13 of the text encoder's 36 layers."""
    tokenizer = chat_tokenizer()
    transformer, unconditional = (
        diffusers.Ideogram4Transformer2DModel(
            in_channels=4 * _LATENTS,
            num_layers=LAYERS,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=13 * WIDTH,
            mrope_section=(4, 2, 2),
            **_HEADS,
        )
        for _ in range(2)
    )
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": _flux2_vae(),
        "text_encoder": transformers.Qwen3VLModel(qwen3_vl_sizes(tokenizer, 36)),
        "tokenizer": tokenizer,
        "transformer": transformer,
        "unconditional_transformer": unconditional,
    }


def _nucleus() -> dict[str, Any]:
    """The first of its blocks is dense, the others are mixtures of experts."""
    tokenizer = chat_tokenizer()
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=4 * _LATENTS,
        out_channels=_LATENTS,
        num_layers=LAYERS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=_AXES,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=32,
        mlp_ratio=6.0,  # with 4.0 the dense block would have no hidden channels: they are a multiple of 128
        capacity_factors=2.0,
        **_HEADS,
    )
    for name, parameter in transformer.named_parameters():
        if ".experts." in name:  # whatever the memory held
            nn.init.normal_(parameter, std=0.1)
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": _qwen_vae(),
        "text_encoder": transformers.Qwen3VLForConditionalGeneration(qwen3_vl_sizes(tokenizer, 8)),
        "processor": qwen3_vl_processor(tokenizer),
        "transformer": transformer,
    }


def _bria_fibo() -> dict[str, Any]:
    """The autoencoder shrinks sides by 16, as the pipeline takes for granted."""
    tokenizer = chat_tokenizer()
    sizes = {name: value for name, value in language_sizes(tokenizer).items() if name != "head_dim"}
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=_LATENTS,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1] * _LATENTS,
            latents_std=[0.9] * _LATENTS,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            is_residual=True,
        ),
        "text_encoder": transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**sizes)),
        "tokenizer": tokenizer,
        "transformer": diffusers.BriaFiboTransformer2DModel(
            in_channels=_LATENTS,
            num_layers=2,
            num_single_layers=LAYERS,
            joint_attention_dim=2 * WIDTH,
            text_encoder_dim=WIDTH,
            pooled_projection_dim=None,
            axes_dims_rope=list(_AXES),
            **_HEADS,
        ),
    }


def _dream_lite() -> dict[str, Any]:
    """A U-Net that sees the sample beside the picture it edits, or beside zeros."""
    tokenizer = chat_tokenizer()
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        "text_encoder": transformers.Qwen3VLForConditionalGeneration(qwen3_vl_sizes(tokenizer)),
        "tokenizer": tokenizer,
        "processor": qwen3_vl_processor(tokenizer),
        "unet": diffusers.DreamLiteUNetModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            block_out_channels=(16, 32),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            layers_per_block=1,
            norm_num_groups=8,
            transformer_layers_per_block=1,
        ),
    }


TOYS = [
    toy_of("Krea2Pipeline", _krea2, {**SMALL, **_LONG}),
    toy_of("OvisImagePipeline", _ovis, {**SMALL, **_LONG}),
    toy_of("LongCatImagePipeline", _longcat, {**SMALL, "enable_prompt_rewrite": False}),
    toy_of("ErnieImagePipeline", _ernie, SMALL),
    toy_of("Ideogram4Pipeline", _ideogram4, {**SMALL, "guidance_schedule": None, "max_sequence_length": 64}),
    toy_of("NucleusMoEImagePipeline", _nucleus, {**SMALL, **_NEGATIVE}),
    toy_of("BriaFiboPipeline", _bria_fibo, {**GUIDED, **_NEGATIVE, "height": 64, "width": 64}),
    toy_of("DreamLitePipeline", _dream_lite, _LARGER),
]
