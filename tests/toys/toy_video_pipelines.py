"""Video pipelines: U-Nets with layers over time, and transformers over space and time."""

from __future__ import annotations

from typing import Any, TypeVar

import diffusers
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from toy_parts import WIDTH, clip_image_encoder, clip_text_encoder, image_vae, t5_text_encoder, umt5_text_encoder
from toy_recipe import Toy, picture, reproducible
from toy_schedulers import SCHEDULERS
from toy_tokenizers import LENGTH, clip_tokenizer, t5_tokenizer
from toy_unet_pipelines import UNCHECKED, stable_diffusion_parts

WAN_LATENTS = 4  # channels
Model = TypeVar("Model", bound=ModelMixin)
_LAYERS = 3  # an early, a middle and a late block
_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 8,
}


# U-Nets


def text_to_video_parts() -> dict[str, Any]:
    tokenizer = clip_tokenizer()
    return {
        "vae": image_vae(),
        "text_encoder": clip_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": diffusers.UNet3DConditionModel(
            **_UNET,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            attention_head_dim=8,
        ),
        "scheduler": SCHEDULERS["DDIM"](),
    }


def _text_to_video() -> DiffusionPipeline:
    return diffusers.TextToVideoSDPipeline(**text_to_video_parts())


def motion_adapter(**options: Any) -> diffusers.MotionAdapter:
    """Layers over time for the U-Net of `stable_diffusion_parts`."""
    return diffusers.MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
        **options,
    )


def _animate_diff() -> DiffusionPipeline:
    """A U-Net for images with a motion adapter: the pipeline makes one U-Net of both."""
    parts = {name: part for name, part in stable_diffusion_parts("DDIM").items() if name not in UNCHECKED}
    return diffusers.AnimateDiffPipeline(**parts, motion_adapter=motion_adapter())


def _stable_video_diffusion() -> DiffusionPipeline:
    """Animates an image. Its norms have 32 groups and its encoder sees 224 x 224 pixels, whatever the config says.

    64 channels, as a group of one channel would take away what the time embedding adds to it. The image is one token:
    attention to it has nothing to choose, so `attn2.to_q` and `attn2.to_k` have no effect here as in the real model.
    """
    time_channels = 8
    return diffusers.StableVideoDiffusionPipeline(
        vae=diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=16
        ),
        image_encoder=clip_image_encoder(224),
        unet=diffusers.UNetSpatioTemporalConditionModel(
            sample_size=8,
            block_out_channels=(64, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=WIDTH,
            num_attention_heads=(2, 2),
            addition_time_embed_dim=time_channels,
            projection_class_embeddings_input_dim=3 * time_channels,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction",
            use_karras_sigmas=True,
            timestep_type="continuous",
            timestep_spacing="leading",
            steps_offset=1,
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        feature_extractor=transformers.CLIPImageProcessor(),
    )


# Transformers


def cogvideox_parts(
    kind: type[Model] = diffusers.CogVideoXTransformer3DModel, in_channels: int = 4, **options: Any
) -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5_text_encoder(tokenizer),
        "vae": diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8),
            down_block_types=("CogVideoXDownBlock3D",) * 2,
            up_block_types=("CogVideoXUpBlock3D",) * 2,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            temporal_compression_ratio=2,
        ),
        "transformer": kind(
            num_layers=_LAYERS,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=in_channels,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=WIDTH,
            max_text_seq_length=LENGTH,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            temporal_compression_ratio=2,
            use_rotary_positional_embeddings=True,
            **options,
        ),
        "scheduler": diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            clip_sample=False,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
        ),
    }


def _cogvideox() -> DiffusionPipeline:
    return diffusers.CogVideoXPipeline(**cogvideox_parts())


def wan_transformer(
    kind: type[Model] = diffusers.WanTransformer3DModel, in_channels: int = WAN_LATENTS, **options: Any
) -> Model:
    return kind(
        num_layers=_LAYERS,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=WAN_LATENTS,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=48,
        rope_max_seq_len=16,
        **options,
    )


def wan_vae(levels: int = 1) -> diffusers.AutoencoderKLWan:
    """Halves the sides and the number of frames once a level."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=WAN_LATENTS,
        dim_mult=[1, *([2] * levels)],
        num_res_blocks=1,
        temperal_downsample=[True] * levels,
        latents_mean=[-0.8, -0.1, 0.5, 1.0],
        latents_std=[2.8, 1.5, 2.3, 1.2],
        scale_factor_temporal=2**levels,
        scale_factor_spatial=2**levels,
    )


def wan_parts(transformer: ModelMixin | None = None) -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": umt5_text_encoder(tokenizer),
        "vae": wan_vae(),
        "transformer": transformer or wan_transformer(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def _wan() -> DiffusionPipeline:
    return diffusers.WanPipeline(**wan_parts())


def _wan_2_2() -> DiffusionPipeline:
    """Two transformers: `transformer` above the boundary of the noise, `transformer_2` below."""
    return diffusers.WanPipeline(**wan_parts(), transformer_2=wan_transformer(), boundary_ratio=0.875)


_GUIDED = {"num_inference_steps": 3, "guidance_scale": 3.0}
_SMALL = {"height": 16, "width": 16}
_READ = {"max_sequence_length": LENGTH}
VIDEO_TOYS = [
    Toy("TextToVideoSDPipeline", reproducible(_text_to_video), {**_GUIDED, **_SMALL, "num_frames": 3}),
    Toy("AnimateDiffPipeline", reproducible(_animate_diff), {**_GUIDED, **_SMALL, "num_frames": 3}),
    Toy(
        "StableVideoDiffusionPipeline",
        reproducible(_stable_video_diffusion),
        {**_SMALL, "num_inference_steps": 3, "num_frames": 3, "max_guidance_scale": 3.0},
        "nothing",
        {"image": picture()},
    ),
    Toy("CogVideoXPipeline", reproducible(_cogvideox), {**_GUIDED, **_SMALL, **_READ, "num_frames": 5}),
    Toy("WanPipeline", reproducible(_wan), {**_GUIDED, **_SMALL, **_READ, "num_frames": 5}),
    Toy("WanPipeline-2.2", reproducible(_wan_2_2), {**_GUIDED, **_SMALL, **_READ, "num_frames": 5}),
]
