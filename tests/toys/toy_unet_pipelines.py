"""Image pipelines around a U-Net: pixels (DDIM, DDPM) and the Stable Diffusion family."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from toy_parts import WIDTH, clip_text_encoder, image_vae
from toy_recipe import Toy, picture, reproducible
from toy_schedulers import SCHEDULERS
from toy_tokenizers import clip_tokenizer
from transformers import CLIPTextModelWithProjection

UNCHECKED: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


# Pixels


def pixel_unet(**options: Any) -> Any:
    return diffusers.UNet2DModel(
        **options,
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def _ddim() -> DiffusionPipeline:
    """Without clipping. The noise is weak, or a random U-Net, which removes none, would leave pixels far off [0, 1]."""
    return diffusers.DDIMPipeline(
        unet=pixel_unet(), scheduler=diffusers.DDIMScheduler(clip_sample=False, beta_end=0.002)
    )


def _ddpm() -> DiffusionPipeline:
    """Its scheduler clips the predicted image to [-1, 1] in each step, as the published DDPM models do."""
    return diffusers.DDPMPipeline(unet=pixel_unet(), scheduler=diffusers.DDPMScheduler(variance_type="fixed_large"))


def _consistency() -> DiffusionPipeline:
    """Grey images of a class, in one step or a few; the batch size and the labels go into one call."""
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=8,
        num_class_embeds=1000,
    )
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_max=2.0, rho=1.0)
    return diffusers.ConsistencyModelPipeline(unet=unet, scheduler=scheduler)


# Stable Diffusion


def conditional_unet(**options: Any) -> Any:
    """Two levels with cross attention in one of them, shortcuts and resampling; latents of 8 x 8."""
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            **options,
        }
    )


def stable_diffusion_parts(scheduler: str = "PNDM", **unet_options: Any) -> dict[str, Any]:
    tokenizer = clip_tokenizer()
    return {
        "vae": image_vae(),
        "text_encoder": clip_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": conditional_unet(**unet_options),
        "scheduler": SCHEDULERS[scheduler](),
        **UNCHECKED,
    }


def _stable_diffusion() -> DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(**stable_diffusion_parts())


def _image_to_image() -> DiffusionPipeline:
    return diffusers.StableDiffusionImg2ImgPipeline(**stable_diffusion_parts("DDIM"))


def _controlnet() -> DiffusionPipeline:
    """The ControlNet starts from the U-Net's weights; its zero convolutions are woken like any zero weight."""
    parts = stable_diffusion_parts("UniPC")
    controlnet = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16))
    return diffusers.StableDiffusionControlNetPipeline(controlnet=controlnet, **parts)


def _latent_consistency() -> DiffusionPipeline:
    """The U-Net is told the guidance scale, in place of a second call without the prompt."""
    return diffusers.LatentConsistencyModelPipeline(**stable_diffusion_parts("LCM", time_cond_proj_dim=16))


def stable_diffusion_xl_parts(scheduler: str = "Euler", sizes: int = 6, **unet_options: Any) -> dict[str, Any]:
    """Two text encoders, several transformer blocks a level, and `sizes` numbers embedded with the time."""
    size_channels = 8
    first, second = clip_tokenizer(), clip_tokenizer()
    return {
        "vae": image_vae(),
        "text_encoder": clip_text_encoder(first),
        "text_encoder_2": clip_text_encoder(second, CLIPTextModelWithProjection),
        "tokenizer": first,
        "tokenizer_2": second,
        "unet": conditional_unet(
            **{
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2),
                "attention_head_dim": (2, 4),
                "cross_attention_dim": 2 * WIDTH,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": size_channels,
                "projection_class_embeddings_input_dim": sizes * size_channels + WIDTH,
                **unet_options,
            }
        ),
        "scheduler": SCHEDULERS[scheduler](),
        "add_watermarker": False,
    }


def _stable_diffusion_xl() -> DiffusionPipeline:
    return diffusers.StableDiffusionXLPipeline(**stable_diffusion_xl_parts())


_PIXELS = {"num_inference_steps": 4}
_FEW = {"num_inference_steps": 2}
_GUIDED = {"num_inference_steps": 4, "guidance_scale": 3.0}
_SMALL = {**_GUIDED, "height": 16, "width": 16}
UNET_TOYS = [
    Toy("DDIMPipeline", reproducible(_ddim), _PIXELS, "nothing"),
    Toy("DDPMPipeline", reproducible(_ddpm), _PIXELS, "nothing"),
    Toy(
        "ConsistencyModelPipeline",
        reproducible(_consistency),
        {"num_inference_steps": 2},
        "class_labels",
        gives_latents=False,
    ),
    Toy("StableDiffusionPipeline", reproducible(_stable_diffusion), _SMALL),
    Toy("StableDiffusionXLPipeline", reproducible(_stable_diffusion_xl), _SMALL),
    Toy(
        "StableDiffusionImg2ImgPipeline",
        reproducible(_image_to_image),
        {**_GUIDED, "strength": 0.75},
        extra={"image": picture()},
    ),
    Toy("StableDiffusionControlNetPipeline", reproducible(_controlnet), _SMALL, extra={"image": picture()}),
    Toy("LatentConsistencyModelPipeline", reproducible(_latent_consistency), _SMALL),
]
