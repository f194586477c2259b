"""Videos from U-Nets: AnimateDiff and its kin, and the zero-shot and ModelScope pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
from families.controlnet import made, with_controlnet
from toy_recipe import Toy, picture
from toy_unet_pipelines import UNCHECKED, stable_diffusion_parts, stable_diffusion_xl_parts
from toy_video_pipelines import motion_adapter, text_to_video_parts

Parts = dict[str, Any]


def _animated(**more: Any) -> Parts:
    parts = {name: part for name, part in stable_diffusion_parts("DDIM").items() if name not in UNCHECKED}
    return {**parts, "motion_adapter": motion_adapter(), **more}


def _sdxl() -> Parts:
    parts = {name: part for name, part in stable_diffusion_xl_parts("DDIM").items() if name != "add_watermarker"}
    return {**parts, "motion_adapter": motion_adapter(use_motion_mid_block=False)}


def _sparse() -> Parts:
    """A ControlNet with motion layers of its own, which sees a few frames and a mask of which they are."""
    net = diffusers.SparseControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        conditioning_channels=4,
        conditioning_embedding_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        use_simplified_condition_embedding=True,
    )
    return _animated(controlnet=net)


def _pia() -> Parts:
    """The U-Net sees the first frame and a mask beside the latents."""
    parts = {**stable_diffusion_parts("DDIM", in_channels=9), "motion_adapter": motion_adapter()}
    return {name: part for name, part in parts.items() if name not in UNCHECKED}


_GUIDED = {"num_inference_steps": 3, "guidance_scale": 3.0}
_SMALL = {**_GUIDED, "height": 16, "width": 16, "num_frames": 3}
_CLIP = [picture(), picture().transpose(0), picture().transpose(1)]
_VIDEO, _FRAMES = {"video": _CLIP}, {"conditioning_frames": _CLIP}
_FROM_VIDEO = {**_GUIDED, "height": 16, "width": 16, "strength": 0.75, "enforce_inference_steps": False}
_ZERO = {**_GUIDED, "num_inference_steps": 4, "height": 16, "width": 16, "video_length": 3, "t0": 1, "t1": 3}
_REFUSED = "detaches its result"
TOYS = [
    Toy(name, made(name, parts), call, extra=extra, refused=_REFUSED if "Zero" in name else "")
    for name, parts, call, extra in [
        ("AnimateDiffControlNetPipeline", lambda: with_controlnet(_animated()), _SMALL, _FRAMES),
        ("AnimateDiffSDXLPipeline", _sdxl, _SMALL, {}),
        ("AnimateDiffSparseControlNetPipeline", _sparse, _SMALL, {"conditioning_frames": _CLIP[:1]}),
        ("AnimateDiffVideoToVideoPipeline", _animated, _FROM_VIDEO, _VIDEO),
        (
            "AnimateDiffVideoToVideoControlNetPipeline",
            lambda: with_controlnet(_animated()),
            _FROM_VIDEO,
            {**_VIDEO, **_FRAMES},
        ),
        ("AnimateDiffPAGPipeline", _animated, {**_SMALL, "pag_scale": 2.0}, {}),
        ("PIAPipeline", _pia, _SMALL, {"image": picture()}),
        ("VideoToVideoSDPipeline", text_to_video_parts, {**_GUIDED, "strength": 0.75}, _VIDEO),
        ("TextToVideoZeroSDXLPipeline", lambda: stable_diffusion_xl_parts("DDIM"), _ZERO, {}),
    ]
]
