"""Image pipelines around a transformer: DiT, PixArt, Sana, Hunyuan-DiT, Stable Diffusion 3 and Flux."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from toy_chats import gemma2_text_encoder
from toy_parts import WIDTH, clip_text_encoder, image_vae, t5_text_encoder
from toy_recipe import Toy, reproducible, toy_of
from toy_schedulers import FLOW_SCHEDULERS
from toy_tokenizers import LENGTH, bert_tokenizer, clip_tokenizer, gemma_tokenizer, t5_tokenizer
from transformers import CLIPTextModelWithProjection

LAYERS = 3  # an early, a middle and a late block
LATENT = 8  # sides of the latent
FLOW_VAE: dict[str, Any] = {"shift_factor": 0.06, "use_quant_conv": False, "use_post_quant_conv": False}
GUIDED = {"num_inference_steps": 4, "guidance_scale": 3.0}
SMALL = {**GUIDED, "height": 16, "width": 16}
READ = {"max_sequence_length": LENGTH}
EXACT = {"use_resolution_binning": False}


def _dit() -> DiffusionPipeline:
    """Class-conditional: 1000 classes, and the empty one that the pipeline guides against."""
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            num_layers=LAYERS,
            num_attention_heads=2,
            attention_head_dim=8,
            sample_size=LATENT,
            in_channels=4,
            out_channels=8,
        ),
        vae=image_vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


def pixart_parts(**options: Any) -> dict[str, Any]:
    """Cross attention to T5's states.

    Args:
        options: of the transformer.
    """
    tokenizer = t5_tokenizer()
    sizes: dict[str, Any] = {
        "num_layers": LAYERS,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": WIDTH,
        "sample_size": LATENT,
        "use_additional_conditions": False,
    }
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5_text_encoder(tokenizer),
        "vae": image_vae(),
        "transformer": diffusers.PixArtTransformer2DModel(**sizes | options),
        "scheduler": diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    }


def sana_parts(**options: Any) -> dict[str, Any]:
    """Linear attention, and a feed-forward of convolutions.

    Args:
        options: of the transformer.
    """
    tokenizer = gemma_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": gemma2_text_encoder(tokenizer),
        "vae": _deep_compression_vae(),
        "transformer": diffusers.SanaTransformer2DModel(num_layers=LAYERS, **SANA_SIZES, **options),
        "scheduler": diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


SANA_SIZES: dict[str, Any] = {  # of the transformer and its ControlNet
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": WIDTH,
    "sample_size": LATENT,
}


def _deep_compression_vae() -> diffusers.AutoencoderDC:
    channels = (4, 8, 16)
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.41407,
    )


def hunyuan_dit_parts() -> dict[str, Any]:
    """Long skip connections. The pipeline fixes the lengths of its prompts: 77 tokens of BERT's and 256 of T5's."""
    bert, t5 = bert_tokenizer(77), t5_tokenizer(256)
    text = transformers.BertConfig(
        vocab_size=len(bert),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
    )
    return {
        "vae": image_vae((4, 4, 8, 8)),
        "text_encoder": transformers.BertModel(text),
        "tokenizer": bert,
        "text_encoder_2": t5_text_encoder(t5),
        "tokenizer_2": t5,
        "transformer": diffusers.HunyuanDiT2DModel(num_layers=4, activation_fn="gelu-approximate", **HUNYUAN_DIT_SIZES),
        "scheduler": diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction"
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


HUNYUAN_DIT_SIZES: dict[str, Any] = {  # of the transformer and its ControlNet
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "hidden_size": 16,
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "in_channels": 4,
    "sample_size": LATENT,
    "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH,
    "pooled_projection_dim": WIDTH,
}


def sd3_parts(latent_channels: int = 4) -> dict[str, Any]:
    """Text and image in one attention; the first block has a second attention for the image, as in SD 3.5 medium."""
    first, second, third = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    sizes = {**SD3_SIZES, "in_channels": latent_channels, "out_channels": latent_channels}
    return {
        "transformer": diffusers.SD3Transformer2DModel(num_layers=LAYERS, **sizes),
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": image_vae(latent_channels=latent_channels, **FLOW_VAE),
        "text_encoder": clip_text_encoder(first, CLIPTextModelWithProjection),
        "tokenizer": first,
        "text_encoder_2": clip_text_encoder(second, CLIPTextModelWithProjection),
        "tokenizer_2": second,
        "text_encoder_3": t5_text_encoder(third, 2 * WIDTH),
        "tokenizer_3": third,
    }


SD3_SIZES: dict[str, Any] = {  # of the transformer and its ControlNet
    "sample_size": LATENT,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "caption_projection_dim": 16,
    "joint_attention_dim": 2 * WIDTH,
    "pooled_projection_dim": 2 * WIDTH,
    "pos_embed_max_size": LATENT,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def flux_parts(extra_channels: int = 0, **vae: Any) -> dict[str, Any]:
    """Blocks for text and image, then blocks for both at once; the guidance scale is an input, as in FLUX.1 dev.

    Args:
        extra_channels: of what the transformer reads beside the latent: a control image, or an image and a mask.
        vae: options of the autoencoder.
    """
    first, second = clip_tokenizer(), t5_tokenizer()
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": image_vae(**FLOW_VAE, **vae),
        "text_encoder": clip_text_encoder(first),
        "tokenizer": first,
        "text_encoder_2": t5_text_encoder(second),
        "tokenizer_2": second,
        "transformer": diffusers.FluxTransformer2DModel(
            in_channels=16 + extra_channels, out_channels=16, num_layers=2, num_single_layers=LAYERS, **FLUX_SIZES
        ),
    }


FLUX_SIZES: dict[str, Any] = {  # of the transformer and its ControlNet
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": True,
}
SANA_CALL = {**GUIDED, **READ, **EXACT, "height": 32, "width": 32, "complex_human_instruction": None}
HUNYUAN_DIT_CALL = {**GUIDED, **EXACT, "height": 64, "width": 64}
TRANSFORMER_TOYS = [
    Toy("DiTPipeline", reproducible(_dit), GUIDED, "class_labels"),
    toy_of("PixArtSigmaPipeline", pixart_parts, {**SMALL, **READ, **EXACT, "clean_caption": False}),
    toy_of("SanaPipeline", sana_parts, SANA_CALL),
    toy_of("HunyuanDiTPipeline", hunyuan_dit_parts, HUNYUAN_DIT_CALL),
    toy_of("StableDiffusion3Pipeline", sd3_parts, {**SMALL, **READ}),
    toy_of("FluxPipeline", flux_parts, {**SMALL, **READ}),
]
