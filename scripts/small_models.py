"""The architectures of the small models: diffusers' classes at sizes that fit 12 MB together with a shared VAE."""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from scenes import COLOURS, NAMES, SIZE
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

LATENT = 16  # latents have shape (4, LATENT, LATENT)
WIDTH = 128  # of the text encoder
GRID = 8  # cells per side of the layouts that the text encoder and the judge learn from


def new_vae() -> AutoencoderKL:
    """A VAE of a quarter of the bundled one's size, with the same latent shape."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def new_unet() -> UNet2DConditionModel:
    """A U-Net of 4.9M parameters, with attention at 8 x 8 and, in the middle, at 4 x 4."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(40, 80, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' historical name for the number of heads
        norm_num_groups=8,
    )


def new_dit() -> PixArtTransformer2DModel:
    """A DiT with cross attention to the caption, patches of 2 x 2."""
    return PixArtTransformer2DModel(
        sample_size=LATENT,
        num_layers=7,
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=192,
        caption_channels=WIDTH,
        use_additional_conditions=False,
        interpolation_scale=1,
    )


def new_mmdit() -> SD3Transformer2DModel:
    """Stable Diffusion 3's joint transformer; the shared text encoder's states replace those of both CLIPs."""
    return SD3Transformer2DModel(
        sample_size=LATENT,
        num_layers=5,
        num_attention_heads=4,
        attention_head_dim=40,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=LATENT // 2,
    )


def new_video_unet() -> UNet3DConditionModel:
    """Stable Diffusion's U-Net with temporal convolutions and attention between its blocks."""
    return UNet3DConditionModel(
        sample_size=LATENT,
        block_out_channels=(32, 80, 96),
        layers_per_block=1,
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=16,
        norm_num_groups=8,
    )


def new_gpt(vocabulary: int, context: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=context,
            n_embd=192,
            n_layer=9,
            n_head=6,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def flow() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow with equal steps."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def ddim() -> DDIMScheduler:
    """Stable Diffusion 1's schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


class LayoutReader(nn.Module):
    """Predicts what is in each cell of a GRID x GRID layout from a caption's states, with one cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Parameter(torch.randn(GRID * GRID, WIDTH) * 0.5)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(NAMES) + len(COLOURS)))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Logits over names and grounds, shape (B, GRID * GRID, classes), from states of shape (B, tokens, WIDTH)."""
        queries = self.cells.expand(len(states), -1, -1)
        return self.head(queries + self.attention(queries, states, states, need_weights=False)[0])


class Judge(nn.Module):
    """Detects which emoji a picture shows, where, and on which ground."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 96, 96)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            stride = 2 if i < 3 else 1
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.names = nn.Conv2d(widths[-1], len(NAMES), 1)
        self.ground = nn.Linear(widths[-1], len(COLOURS))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of each name in each cell, (B, names, GRID, GRID), and of each ground, (B, grounds).

        `pixels` has shape (B, 3, 64, 64) and values in [-1, 1].
        """
        y = self.features(pixels)
        return self.names(y), self.ground(y.mean(dim=(2, 3)))
