"""Published denoisers in their original configurations, built without weights on the meta device.

Each has its published number of parameters, or the number implied by the size of its published file, and the source of
that number. Prints what diffusers builds from them:

    python scripts/published_configs.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn


@dataclass(frozen=True)
class Published:
    """A denoiser's class in diffusers and its configuration.

    Attributes:
        parameters: number of published parameters, as exact as `source` gives it.
        source: where that number comes from.
    """

    kind: str
    parameters: int
    source: str
    config: dict[str, Any]


_SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
}
_SD15_BLOCKS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}

PUBLISHED = {
    "ddpm-cifar10-32": Published(
        "UNet2DModel",
        35_700_000,
        "DDPM, appendix B; the file has 143 MB in fp32",
        {
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (128, 256, 256, 256),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "downsample_padding": 0,
            "norm_eps": 1e-6,
        },
    ),
    "stable-diffusion-v1-5": Published(
        "UNet2DConditionModel",
        859_520_964,
        "diffusers' documentation of num_parameters()",
        {**_SD15, **_SD15_BLOCKS, "out_channels": 4, "attention_head_dim": 8},
    ),
    "stable-diffusion-xl-base-1.0": Published(
        "UNet2DConditionModel",
        2_567_463_684,
        "logs of its trainers; 2.6B in the paper",
        {
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "text-to-video-ms-1.7b": Published(
        "UNet3DConditionModel",
        5_645_118_394 // 4,
        "bytes of the fp32 file; 1.7B with text encoder and VAE",
        {
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
            "up_block_types": ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
            "cross_attention_dim": 1024,
            "attention_head_dim": 64,
        },
    ),
    "animatediff-v1-5-2": Published(
        "UNetMotionModel",
        859_520_964 + 453_000_000,
        "Stable Diffusion 1.5 and the 453M of mm_sd_v15_v2 in AnimateDiff's README",
        {
            **_SD15,
            "out_channels": 4,
            "down_block_types": ("CrossAttnDownBlockMotion",) * 3 + ("DownBlockMotion",),
            "up_block_types": ("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * 3,
            "num_attention_heads": 8,
            "motion_num_attention_heads": 8,
            "motion_max_seq_length": 32,
            "use_motion_mid_block": True,
        },
    ),
    "stable-video-diffusion-img2vid": Published(
        "UNetSpatioTemporalConditionModel",
        6_098_682_464 // 4,
        "bytes of the XT version's fp32 file, the same network for 25 frames",
        {
            "sample_size": 96,
            "in_channels": 8,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
            "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 3,
            "num_attention_heads": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 768,
            "num_frames": 14,
        },
    ),
    "sd-controlnet-canny": Published(
        "ControlNetModel",
        361_279_120,
        "reports by people who train it; 1.45 GB in fp32",
        {
            "in_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "down_block_types": _SD15_BLOCKS["down_block_types"],
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "conditioning_embedding_out_channels": (16, 32, 96, 256),
        },
    ),
    "DiT-XL-2-256": Published(
        "DiTTransformer2DModel",
        675_129_632 + 27 * 2_777_472,
        "675M in the paper; diffusers repeats the embedding of timestep and label in every block (3 GB in fp32)",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "sample_size": 32,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
        },
    ),
    "PixArt-Sigma-XL-2-1024-MS": Published(
        "PixArtTransformer2DModel",
        610_856_096,
        "profiles of the pipeline; 2.44 GB in fp32",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "sample_size": 128,
            "patch_size": 2,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "use_additional_conditions": False,
        },
    ),
    "HunyuanDiT-v1.2": Published(
        "HunyuanDiT2DModel",
        1_500_000_000,
        "1.5B in the paper; the file has 6 GB in fp32",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 88,
            "hidden_size": 1408,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 128,
            "num_layers": 40,
            "mlp_ratio": 4.3637,
            "activation_fn": "gelu-approximate",
            "cross_attention_dim": 1024,
            "cross_attention_dim_t5": 2048,
            "pooled_projection_dim": 1024,
            "learn_sigma": True,
            "norm_type": "layer_norm",
            "text_len": 77,
            "text_len_t5": 256,
            "use_style_cond_and_image_meta_size": False,
        },
    ),
    "stable-diffusion-3-medium": Published(
        "SD3Transformer2DModel",
        2_028_328_000,
        "profiles of the pipeline; 2B in the announcement",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
    ),
    "AuraFlow-v0.3": Published(
        "AuraFlowTransformer2DModel",
        27_430_000_000 // 4,
        "bytes of the fp32 files",
        {
            "sample_size": 64,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 4,
            "num_single_dit_layers": 32,
            "num_attention_heads": 12,
            "attention_head_dim": 256,
            "joint_attention_dim": 2048,
            "caption_projection_dim": 3072,
            "pos_embed_max_size": 9216,
        },
    ),
    "FLUX.1-dev": Published(
        "FluxTransformer2DModel",
        11_901_408_320,
        "the Hub's count; 12B in the announcement",
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
    ),
    "Sana_1600M_1024px": Published(
        "SanaTransformer2DModel",
        3_210_000_000 // 2,
        "bytes of the fp16 file; 1.6B in the paper",
        {
            "sample_size": 32,
            "patch_size": 1,
            "in_channels": 32,
            "out_channels": 32,
            "num_layers": 20,
            "num_attention_heads": 70,
            "attention_head_dim": 32,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
            "caption_channels": 2304,
            "mlp_ratio": 2.5,
        },
    ),
    "Lumina-Image-2.0": Published(
        "Lumina2Transformer2DModel",
        10_442_000_000 // 4,
        "bytes of the fp32 files; 2.6B in the paper",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "hidden_size": 2304,
            "num_layers": 26,
            "num_refiner_layers": 2,
            "num_attention_heads": 24,
            "num_kv_heads": 8,
            "multiple_of": 256,
            "cap_feat_dim": 2304,
        },
    ),
    "Qwen-Image": Published(
        "QwenImageTransformer2DModel",
        20_430_401_088,
        "the Hub's count; 20B in the report",
        {
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 3584,
        },
    ),
    "Z-Image-Turbo": Published(
        "ZImageTransformer2DModel",
        6_154_908_736,
        "the Hub's count; 6B in the report",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
        },
    ),
    "CogVideoX-2b": Published(
        "CogVideoXTransformer3DModel",
        3_390_000_000 // 2,
        "bytes of the fp16 file",
        {
            "num_attention_heads": 30,
            "attention_head_dim": 64,
            "in_channels": 16,
            "out_channels": 16,
            "time_embed_dim": 512,
            "text_embed_dim": 4096,
            "num_layers": 30,
            "patch_size": 2,
        },
    ),
    "HunyuanVideo": Published(
        "HunyuanVideoTransformer3DModel",
        25_640_000_000 // 2,
        "bytes of the bf16 files of a copy; 13B in the report",
        {
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 20,
            "num_single_layers": 40,
            "num_refiner_layers": 2,
            "patch_size": 2,
            "patch_size_t": 1,
            "text_embed_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
    ),
    "LTX-Video": Published(
        "LTXVideoTransformer3DModel",
        1_923_385_472,
        "finetrainers' documentation; 7.69 GB in fp32",
        {
            "in_channels": 128,
            "out_channels": 128,
            "num_attention_heads": 32,
            "attention_head_dim": 64,
            "cross_attention_dim": 2048,
            "num_layers": 28,
            "caption_channels": 4096,
        },
    ),
    "Wan2.1-T2V-1.3B": Published(
        "WanTransformer3DModel",
        1_418_996_800,
        "reports by people who train it",
        {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    "Wan2.2-T2V-A14B": Published(
        "WanTransformer3DModel",
        14_288_491_584,
        "the Hub's count, of either of its two denoisers",
        {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    ),
}


def published(name: str) -> nn.Module:
    """The denoiser `name` of `PUBLISHED`, on the meta device."""
    model = PUBLISHED[name]
    with torch.device("meta"):
        return getattr(diffusers, model.kind)(**model.config)


def parameter_count(model: nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in model.parameters())


def main() -> None:
    for name, model in PUBLISHED.items():
        built = parameter_count(published(name))
        off = f"{100 * (built / model.parameters - 1):+.2f}%"
        print(f"{name:<31} {model.kind:<33} {built:>14,} {model.parameters:>14,} {off:>7}  {model.source}")


if __name__ == "__main__":
    main()
