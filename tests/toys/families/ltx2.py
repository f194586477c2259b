"""LTX-2: videos with a sound track, made by one transformer."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from toy_parts import WIDTH
from toy_recipe import Toy, picture, reproducible
from toy_tokenizers import LENGTH, gemma_tokenizer

_LATENTS = 4  # channels
_MELS = 8
_TEXT_LAYERS = 2


def _text_encoder(tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.Gemma3ForConditionalGeneration:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": _TEXT_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def _connectors() -> LTX2TextConnectors:
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    return LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=_TEXT_LAYERS + 1,
        **{f"{part}_connector_{name}": value for part in ("video", "audio") for name, value in heads.items()},
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )


def _parts() -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _text_encoder(tokenizer),
        "connectors": _connectors(),
        "transformer": diffusers.LTX2VideoTransformer3DModel(
            in_channels=_LATENTS,
            out_channels=_LATENTS,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=_LATENTS,
            audio_out_channels=_LATENTS,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=3,
            caption_channels=WIDTH,
            rope_double_precision=False,
            rope_type="split",
        ),
        "vae": diffusers.AutoencoderKLLTX2Video(
            latent_channels=_LATENTS,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=1,
            patch_size_t=1,
        ),
        "audio_vae": diffusers.AutoencoderKLLTX2Audio(
            base_channels=4,
            output_channels=2,
            ch_mult=(1,),
            num_res_blocks=1,
            in_channels=2,
            resolution=32,
            latent_channels=2,
            mel_bins=_MELS,
        ),
        "vocoder": LTX2Vocoder(
            in_channels=2 * _MELS,
            hidden_channels=16,
            out_channels=2,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


def _new(kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    return kind(**_parts())


_CALL = {
    "num_inference_steps": 3,
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "spatio_temporal_guidance_blocks": [1],
    "max_sequence_length": LENGTH,
}
_PICTURE = {"image": picture(32)}
TOYS = [
    Toy("LTX2Pipeline", reproducible(lambda: _new(diffusers.LTX2Pipeline)), _CALL),
    Toy(
        "LTX2ImageToVideoPipeline",
        reproducible(lambda: _new(diffusers.LTX2ImageToVideoPipeline)),
        {**_CALL, "image_crf": 0},
        extra=_PICTURE,
    ),
    Toy("LTX2ConditionPipeline", reproducible(lambda: _new(diffusers.LTX2ConditionPipeline)), _CALL),
]
