"""Stable Diffusion 1 and 2: pictures as input, upscalers, and pipelines that start from a picture's CLIP embedding."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from torch import nn
from toy_parts import WIDTH, clip_image_encoder, clip_image_processor, clip_text_encoder, image_vae
from toy_recipe import Toy, mask, picture, reproducible
from toy_schedulers import SCHEDULERS
from toy_tokenizers import LENGTH, clip_tokenizer
from toy_unet_pipelines import UNCHECKED, conditional_unet, stable_diffusion_parts
from transformers import CLIPTextModelWithProjection, DPTConfig, DPTForDepthEstimation, DPTImageProcessor


def _inpaint() -> DiffusionPipeline:
    """A U-Net of text to image: in each step, what the mask keeps is put back."""
    return diffusers.StableDiffusionInpaintPipeline(**stable_diffusion_parts("DDIM"))


def _inpaint_trained() -> DiffusionPipeline:
    """A U-Net for inpainting: it sees the mask and the masked picture beside the latents."""
    return diffusers.StableDiffusionInpaintPipeline(**stable_diffusion_parts("DPM++ 2M", in_channels=9))


def _instruct() -> DiffusionPipeline:
    parts = stable_diffusion_parts("Euler ancestral", in_channels=8)
    return diffusers.StableDiffusionInstructPix2PixPipeline(**parts)


def _depth_estimator() -> DPTForDepthEstimation:
    config = DPTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    found = DPTForDepthEstimation(config)
    nn.init.ones_(found.head.head[-2].bias)  # or the ReLU that follows makes all depths zero
    return found


def _depth() -> DiffusionPipeline:
    parts = {**stable_diffusion_parts("DDIM", in_channels=5), "feature_extractor": DPTImageProcessor(size=32)}
    parts = {name: part for name, part in parts.items() if "safety" not in name}
    return diffusers.StableDiffusionDepth2ImgPipeline(**parts, depth_estimator=_depth_estimator())


def _upscale() -> DiffusionPipeline:
    """The U-Net sees the small picture beside the latents, and the noise added to it as a class."""
    parts = stable_diffusion_parts("DDIM", in_channels=7, num_class_embeds=1000)
    parts = {name: part for name, part in parts.items() if name != "requires_safety_checker"}
    return diffusers.StableDiffusionUpscalePipeline(**parts, low_res_scheduler=diffusers.DDPMScheduler())


def _latent_upscale() -> DiffusionPipeline:
    """Blocks of the k-diffusion library: no stem or head of 3 x 3, no middle block, another embedding of time."""
    tokenizer, noise_channels = clip_tokenizer(), 128
    return diffusers.StableDiffusionLatentUpscalePipeline(
        vae=image_vae(),
        text_encoder=clip_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            act_fn="gelu",
            attention_head_dim=8,
            norm_num_groups=None,
            block_out_channels=(32, 64, 64),
            layers_per_block=2,
            time_cond_proj_dim=noise_channels + WIDTH,
            conv_in_kernel=1,
            conv_out_kernel=1,
            cross_attention_dim=WIDTH,
            in_channels=8,
            out_channels=5,
            down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
            mid_block_type=None,
            up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
            only_cross_attention=False,
            resnet_time_scale_shift="scale_shift",
            time_embedding_type="fourier",
            timestep_post_act="gelu",
        ),
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type="sample"),
    )


def _variation() -> DiffusionPipeline:
    return diffusers.StableDiffusionImageVariationPipeline(
        **{**UNCHECKED, "feature_extractor": clip_image_processor()},
        vae=image_vae(),
        image_encoder=clip_image_encoder(),
        unet=conditional_unet(),
        scheduler=SCHEDULERS["DDIM"](),
    )


def _unclip_parts() -> dict[str, Any]:
    """The U-Net is told a CLIP embedding of the picture, and how much noise was added to it."""
    parts = stable_diffusion_parts(
        "DDIM", class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH
    )
    return {
        **{name: part for name, part in parts.items() if name not in UNCHECKED},
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }


def _unclip() -> DiffusionPipeline:
    """A prior, with a loop of its own, draws the embedding of the picture from the prompt."""
    tokenizer = clip_tokenizer()
    return diffusers.StableUnCLIPPipeline(
        **_unclip_parts(),
        prior_tokenizer=tokenizer,
        prior_text_encoder=clip_text_encoder(tokenizer, CLIPTextModelWithProjection),
        prior=prior_transformer(),
        prior_scheduler=diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
    )


def _unclip_image() -> DiffusionPipeline:
    return diffusers.StableUnCLIPImg2ImgPipeline(
        **_unclip_parts(), feature_extractor=clip_image_processor(), image_encoder=clip_image_encoder()
    )


def prior_transformer() -> Any:
    """It draws an image embedding of WIDTH numbers."""
    return diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=LENGTH,
        additional_embeddings=4,
    )


_GUIDED = {"num_inference_steps": 4, "guidance_scale": 3.0}
_SMALL = {**_GUIDED, "height": 16, "width": 16}
_PICTURE = {"image": picture()}
_MASKED = {**_PICTURE, "mask_image": mask()}
TOYS = [
    Toy("StableDiffusionInpaintPipeline", reproducible(_inpaint), _SMALL, extra=_MASKED),
    Toy("StableDiffusionInpaintPipeline-9-channels", reproducible(_inpaint_trained), _SMALL, extra=_MASKED),
    Toy("StableDiffusionInstructPix2PixPipeline", reproducible(_instruct), _GUIDED, extra=_PICTURE),
    Toy("StableDiffusionDepth2ImgPipeline", reproducible(_depth), _GUIDED, extra=_PICTURE),
    Toy("StableDiffusionUpscalePipeline", reproducible(_upscale), _GUIDED, extra={"image": picture(8)}),
    Toy("StableDiffusionLatentUpscalePipeline", reproducible(_latent_upscale), _GUIDED, extra={"image": picture(16)}),
    Toy("StableDiffusionImageVariationPipeline", reproducible(_variation), _SMALL, "nothing", _PICTURE),
    Toy("StableUnCLIPPipeline", reproducible(_unclip), {**_SMALL, "prior_num_inference_steps": 2}),
    Toy("StableUnCLIPImg2ImgPipeline", reproducible(_unclip_image), _SMALL, extra=_PICTURE),
]
