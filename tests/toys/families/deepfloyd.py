"""DeepFloyd IF: pixels from a prompt, and a second stage that enlarges them."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.deepfloyd_if.watermark import IFWatermarker
from families.controlnet import made
from toy_parts import WIDTH, t5_text_encoder
from toy_recipe import Toy, mask, picture
from toy_tokenizers import t5_tokenizer

Parts = dict[str, Any]


def _parts(**unet_options: Any) -> Parts:
    """The U-Net also predicts a variance; its scheduler clips the pixels that it predicts by their percentiles."""
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5_text_encoder(tokenizer),
        "unet": diffusers.UNet2DConditionModel(
            **{
                "sample_size": 16,
                "in_channels": 3,
                "out_channels": 6,
                "layers_per_block": 1,
                "block_out_channels": (16, 32),
                "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
                "cross_attention_dim": 32,  # its norm has 32 groups
                "encoder_hid_dim": WIDTH,
                "attention_head_dim": 8,
                "addition_embed_type": "text",
                "addition_embed_type_num_heads": 2,
                "cross_attention_norm": "group_norm",
                "norm_num_groups": 8,
                "resnet_time_scale_shift": "scale_shift",
                "act_fn": "gelu",
                **unet_options,
            }
        ),
        "scheduler": diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=4.0,
            variance_type="learned_range",
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": IFWatermarker(),
        "requires_safety_checker": False,
    }


def _larger() -> Parts:
    """It sees the small picture, enlarged and noised, beside the pixels."""
    options = {"in_channels": 6, "class_embed_type": "timestep", "time_embedding_act_fn": "gelu"}
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return {**_parts(**options), "image_noising_scheduler": noising}


_GUIDED = {"num_inference_steps": 4, "guidance_scale": 3.0, "clean_caption": False}
_PART_OF_THE_WAY = {**_GUIDED, "strength": 0.75}
_SMALL = {**_GUIDED, "height": 16, "width": 16}
_PICTURE = {"image": picture()}
_MASKED = {**_PICTURE, "mask_image": mask()}
_ENLARGED = {"image": picture(8), "original_image": picture()}
TOYS = [
    Toy(name, made(name, parts), call, extra=extra, gives_latents=False)
    for name, parts, call, extra in [
        ("IFPipeline", _parts, _SMALL, {}),
        ("IFImg2ImgPipeline", _parts, _PART_OF_THE_WAY, _PICTURE),
        ("IFInpaintingPipeline", _parts, _GUIDED, _MASKED),
        ("IFSuperResolutionPipeline", _larger, {**_SMALL, "noise_level": 50}, {"image": picture(8)}),
        ("IFImg2ImgSuperResolutionPipeline", _larger, {**_PART_OF_THE_WAY, "noise_level": 50}, _ENLARGED),
        (
            "IFInpaintingSuperResolutionPipeline",
            _larger,
            {**_PART_OF_THE_WAY, "noise_level": 50},
            {**_ENLARGED, "mask_image": mask()},
        ),
    ]
]
