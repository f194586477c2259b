"""What several toys share: text encoders and an autoencoder, each of the real class."""

from __future__ import annotations

from typing import Any, TypeVar

from diffusers import AutoencoderKL
from toy_tokenizers import LENGTH
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 16  # channels of a text encoder's output
VisionClass = TypeVar("VisionClass", CLIPVisionModel, CLIPVisionModelWithProjection)
ClipClass = TypeVar("ClipClass", CLIPTextModel, CLIPTextModelWithProjection)


def clip_text_encoder(
    tokenizer: PreTrainedTokenizerBase, kind: type[ClipClass] = CLIPTextModel, length: int = LENGTH
) -> ClipClass:
    """Two layers, so that SDXL and SD3 can take the last but one. Output (B, LENGTH, WIDTH), pooled (B, WIDTH)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=2.0,  # the state before the last norm, which SDXL and SD3 take, is then about 1
    )
    return kind(config)


def clip_image_encoder(image_size: int = 32) -> CLIPVisionModelWithProjection:
    """Two layers and 16 patches. Output (B, 17, WIDTH), pooled (B, WIDTH)."""
    config = CLIPVisionConfig(
        image_size=image_size,
        patch_size=image_size // 4,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return CLIPVisionModelWithProjection(config)


def clip_image_processor(image_size: int = 32) -> CLIPImageProcessor:
    """For `clip_image_encoder`."""
    return CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=image_size)


def t5_text_encoder(tokenizer: PreTrainedTokenizerBase, width: int = WIDTH) -> T5EncoderModel:
    """Two layers. Output (B, tokens, width)."""
    return T5EncoderModel(T5Config(**_t5_sizes(tokenizer, width)))


def umt5_text_encoder(tokenizer: PreTrainedTokenizerBase, width: int = WIDTH) -> UMT5EncoderModel:
    """As T5, but each layer has a position bias of its own."""
    return UMT5EncoderModel(UMT5Config(**_t5_sizes(tokenizer, width)))


def _t5_sizes(tokenizer: PreTrainedTokenizerBase, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": width // 2,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }


def clip_vision_encoder(kind: type[VisionClass] = CLIPVisionModel) -> VisionClass:
    """Sees 8 x 8 pixels in 4 patches, as `clip_vision_processor` makes them. Output (B, 5, WIDTH)."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return kind(config)


def clip_vision_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(crop_size=8, size=8)


def siglip_encoder() -> SiglipVisionModel:
    """Sees 8 x 8 pixels in 4 patches, as `siglip_processor` makes them. Output (B, 4, WIDTH)."""
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return SiglipVisionModel(config)


def siglip_processor() -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": 8, "width": 8})


def image_vae(channels: tuple[int, ...] = (8, 16), latent_channels: int = 4, **options: Any) -> AutoencoderKL:
    """Halves the sides once for each level but the first."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )
