"""Transformers that have an original checkpoint in another layout, each small and of the real class.

`convert` calls diffusers' own converter from the original layout, or for classes that diffusers converts only by
scripts, does what those scripts do. Some converters fix the width of the real model; `toy_width` gives them the toy's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as converters

Tensors = Mapping[str, torch.Tensor]
Convert = Callable[[dict[str, torch.Tensor]], Tensors]


@dataclass(frozen=True)
class Original:
    """One class with an original layout.

    Attributes:
        config: of a toy.
        converter: original -> diffusers, for the width of the real model; the name of one of diffusers'.
        real: what the config of the real model has instead, if its converter fixes widths; blocks may be fewer.
        toy_width: constants in the converter -> the toy's.
    """

    name: str
    config: Mapping[str, Any]
    converter: str | Convert
    real: Mapping[str, Any] = field(default_factory=dict)
    toy_width: Mapping[int, int] = field(default_factory=dict)

    def model(self, **changed: Any) -> Any:
        """The toy, or one with another config. Skips the test if diffusers is too old to have the class."""
        known = hasattr(diffusers, self.class_name)
        if not known or (isinstance(self.converter, str) and not hasattr(converters, self.converter)):
            pytest.skip(f"diffusers {diffusers.__version__} has no {self.class_name} in one file")
        return getattr(diffusers, self.class_name)(**{**self.config, **changed}).eval()

    @property
    def class_name(self) -> str:
        return self.name.partition("-")[0]

    def convert(self, tensors: dict[str, torch.Tensor], toy: bool = False) -> Tensors:
        """Convert a checkpoint in the original layout.

        Args:
            toy: whether it has the width of the toy.
        """
        convert = getattr(converters, self.converter) if isinstance(self.converter, str) else self.converter
        return with_constants(convert, self.toy_width)(tensors) if toy and self.toy_width else convert(tensors)


def with_constants(function: Any, changed: Mapping[int, int]) -> Any:
    """A function with other numbers in its code, and in that of functions within it."""

    def code(old: CodeType) -> CodeType:
        return old.replace(co_consts=tuple(code(c) if isinstance(c, CodeType) else _other(c) for c in old.co_consts))

    def _other(constant: Any) -> Any:
        if isinstance(constant, tuple):
            return tuple(map(_other, constant))
        return changed[constant] if type(constant) is int and constant in changed else constant

    made = FunctionType(code(function.__code__), function.__globals__, closure=function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class _Lasting(dict[str, torch.Tensor]):
    """A state dict that keeps what is taken out of it."""

    def pop(self, name: str, *default: Any) -> Any:
        return self.get(name, *default)


def _cosmos_1(tensors: dict[str, torch.Tensor]) -> Tensors:
    """The converter recognizes the version by a name with a prefix, after it took all tensors out of the checkpoint."""
    checkpoint = _Lasting({f"net.{name}": tensor for name, tensor in tensors.items()})
    return converters.convert_cosmos_transformer_checkpoint_to_diffusers(checkpoint)


def _mochi(tensors: dict[str, torch.Tensor]) -> Tensors:
    """The converter takes 48 blocks, the last of which differs: those that the toy lacks are copies of its first."""
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    whole = {name.replace(f"blocks.{last}.", "blocks.47."): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if name.startswith("blocks.0."):
            whole |= {name.replace("blocks.0.", f"blocks.{i}."): tensor for i in range(last, 47)}
    found = converters.convert_mochi_transformer_checkpoint_to_diffusers(whole)
    copies = tuple(f"transformer_blocks.{i}." for i in range(last, 47))
    kept = {name: tensor for name, tensor in found.items() if not name.startswith(copies)}
    return {name.replace("blocks.47.", f"blocks.{last}."): tensor for name, tensor in kept.items()}


def _hunyuan(tensors: dict[str, torch.Tensor], renamed: Mapping[str, str]) -> Tensors:
    """HunyuanImage and HunyuanVideo 1.5 have HunyuanVideo's blocks, whose converter splits a fixed width."""
    width = len(tensors["txt_in.individual_token_refiner.blocks.0.norm1.weight"])
    convert = with_constants(converters.convert_hunyuan_video_transformer_to_diffusers, {3072: width})
    found = {}
    for name, tensor in convert(dict(tensors)).items():
        for old, new in renamed.items():
            name = name.replace(old, new) if name.startswith(old) else name
        found[name] = tensor
    return found


def _hunyuan_image(tensors: dict[str, torch.Tensor]) -> Tensors:
    renamed = {"time_text_embed": "time_guidance_embed", **_BYT5, **_time_r("time_guidance_embed")}
    return _hunyuan(tensors, renamed)


def _hunyuan_video_15(tensors: dict[str, torch.Tensor]) -> Tensors:
    vision = {"proj.0": "norm_in", "proj.1": "linear_1", "proj.3": "linear_2", "proj.4": "norm_out"}
    seen = {f"vision_in.{old}": f"image_embedder.{new}" for old, new in vision.items()}
    renamed = {"time_text_embed": "time_embed", **_BYT5, **seen, "cond_type_embedding": "cond_type_embed"}
    return _hunyuan(tensors, {**renamed, **_time_r("time_embed")})


_BYT5 = {
    "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.net.0.proj": "context_embedder_2.linear_1",  # HunyuanVideo's converter renames fc1 and fc2 everywhere
    "byt5_in.net.2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3",
}


def _time_r(embedder: str) -> dict[str, str]:
    return {f"time_r_in.mlp.{2 * i}": f"{embedder}.timestep_embedder_r.linear_{i + 1}" for i in (0, 1)}


def _pixart(tensors: dict[str, torch.Tensor]) -> Tensors:
    """As scripts/convert_pixart_sigma_to_diffusers.py in diffusers' repository."""
    renamed = {
        "x_embedder": "pos_embed",
        "y_embedder.y_proj.fc": "caption_projection.linear_",
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
        "final_layer.": "",
        "blocks.": "transformer_blocks.",
        "t_embedder": "adaln_single.emb.timestep_embedder",
        "csize_embedder": "adaln_single.emb.resolution_embedder",
        "ar_embedder": "adaln_single.emb.aspect_ratio_embedder",
    }
    inner = {
        ".attn.proj": ".attn1.to_out.0",
        ".cross_attn.proj": ".attn2.to_out.0",
        ".cross_attn.q_linear": ".attn2.to_q",
        ".mlp.fc1": ".ff.net.0.proj",
        ".mlp.fc2": ".ff.net.2",
        "embedder.mlp.0": "embedder.linear_1",
        "embedder.mlp.2": "embedder.linear_2",
    }
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        start = next((old for old in renamed if name.startswith(old)), "")
        name = renamed.get(start, "") + name.removeprefix(start)
        for old, new in inner.items():
            name = name.replace(old, new)
        merged = {".attn.qkv.": ".attn1.to_{}.", ".cross_attn.kv_linear.": ".attn2.to_{}."}
        holder = next((old for old in merged if old in name), None)
        if holder is None:
            found[name] = tensor
            continue
        letters = "qkv" if holder == ".attn.qkv." else "kv"
        for letter, part in zip(letters, tensor.chunk(len(letters)), strict=True):
            found[name.replace(holder, merged[holder].format(letter))] = part
    return found


def _same(tensors: dict[str, torch.Tensor]) -> Tensors:
    return tensors


_HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}
_FLUX_LIKE = {
    **_HEADS,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 64,
}
_REAL_FLUX = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 2, "num_single_layers": 2}
_WAN = {**_HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 64, "freq_dim": 64, "ffn_dim": 128, "num_layers": 2}
_WAN_I2V = {**_WAN, "image_dim": 64, "added_kv_proj_dim": 64}
_HUNYUAN = {**_HEADS, "num_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 64}
_HUNYUAN_OLD = {**_HUNYUAN, "num_single_layers": 1}
_COSMOS = {**_HEADS, "num_layers": 2, "text_embed_dim": 64, "adaln_lora_dim": 64, "max_size": (4, 8, 8)}
_LTX = {**_HEADS, "in_channels": 64, "out_channels": 64, "num_layers": 2}
_LTX_2 = {
    **_LTX,
    "cross_attention_dim": 64,
    "audio_in_channels": 64,
    "audio_out_channels": 64,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 64,
    "caption_channels": 64,
}
_PIXART = {**_HEADS, "num_layers": 2, "cross_attention_dim": 64, "caption_channels": 64, "sample_size": 8}

ORIGINALS = [
    Original(
        "FluxTransformer2DModel",
        {**_FLUX_LIKE, "pooled_projection_dim": 64, "guidance_embeds": True},
        "convert_flux_transformer_checkpoint_to_diffusers",
        _REAL_FLUX,
        {3072: 64},
    ),
    Original(
        "ChromaTransformer2DModel",
        {**_FLUX_LIKE, "approximator_hidden_dim": 64, "approximator_layers": 2},
        "convert_chroma_transformer_checkpoint_to_diffusers",
        _REAL_FLUX,
        {3072: 64},
    ),
    Original(
        "Flux2Transformer2DModel",
        {**_FLUX_LIKE, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 64},
        "convert_flux2_transformer_checkpoint_to_diffusers",
    ),
    Original(
        "SD3Transformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "caption_projection_dim": 64,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        "convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    Original(
        "AuraFlowTransformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 64,
            "caption_projection_dim": 64,
            "pos_embed_max_size": 16,
        },
        "convert_auraflow_transformer_checkpoint_to_diffusers",
    ),
    Original("PixArtTransformer2DModel", {**_PIXART, "use_additional_conditions": False}, _pixart),
    Original("PixArtTransformer2DModel-alpha", {**_PIXART, "use_additional_conditions": True}, _pixart),
    Original(
        "Lumina2Transformer2DModel",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 64,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (8, 8, 8),
            "cap_feat_dim": 64,
        },
        "convert_lumina2_to_diffusers",
        {"hidden_size": 2304, "num_attention_heads": 24, "num_kv_heads": 8, "axes_dim_rope": (32, 32, 32)},
        {2304: 64, 768: 32},
    ),
    Original(
        "ZImageTransformer2DModel",
        {
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 64,
            "axes_dims": (4, 6, 6),
            "axes_lens": (8, 8, 8),
        },
        "convert_z_image_transformer_checkpoint_to_diffusers",
    ),
    Original(
        "QwenImageTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 64,
            "num_layers": 2,
            "joint_attention_dim": 64,
            "axes_dims_rope": (4, 6, 6),
        },
        _same,
    ),
    Original(
        "HiDreamImageTransformer2DModel",
        {
            **_HEADS,
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": (64, 64),
            "text_emb_dim": 64,
            "axes_dims_rope": (8, 8),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1),
        },
        "convert_hidream_transformer_to_diffusers",
    ),
    Original("WanTransformer3DModel", _WAN, "convert_wan_transformer_to_diffusers"),
    Original("WanTransformer3DModel-I2V", _WAN_I2V, "convert_wan_transformer_to_diffusers"),
    Original(
        "WanVACETransformer3DModel",
        {**_WAN, "vace_layers": (0, 1), "vace_in_channels": 8},
        "convert_wan_transformer_to_diffusers",
    ),
    Original(
        "LTXVideoTransformer3DModel",
        {**_LTX, "cross_attention_dim": 64, "caption_channels": 64},
        "convert_ltx_transformer_checkpoint_to_diffusers",
    ),
    Original("LTX2VideoTransformer3DModel", _LTX_2, "convert_ltx2_transformer_to_diffusers"),
    Original(
        "HunyuanVideoTransformer3DModel",
        {**_HUNYUAN_OLD, "pooled_projection_dim": 64, "rope_axes_dim": (4, 6, 6)},
        "convert_hunyuan_video_transformer_to_diffusers",
        {**_REAL_FLUX, "num_layers": 1},
        {3072: 64},
    ),
    Original(
        "HunyuanImageTransformer2DModel",
        {
            **_HUNYUAN_OLD,
            "text_embed_2_dim": 64,
            "guidance_embeds": True,
            "use_meanflow": True,
            "rope_axes_dim": (8, 8),
        },
        _hunyuan_image,
    ),
    Original(
        "HunyuanVideo15Transformer3DModel",
        {**_HUNYUAN, "text_embed_2_dim": 64, "image_embed_dim": 64, "use_meanflow": True, "rope_axes_dim": (4, 6, 6)},
        _hunyuan_video_15,
    ),
    Original("CosmosTransformer3DModel", _COSMOS, _cosmos_1),
    Original(
        "CosmosTransformer3DModel-2",
        {**_COSMOS, "extra_pos_embed_type": None},
        "convert_cosmos_transformer_checkpoint_to_diffusers",
    ),
    Original(
        "MochiTransformer3DModel",
        {**_HEADS, "num_layers": 3, "pooled_projection_dim": 32, "text_embed_dim": 64, "time_embed_dim": 64},
        _mochi,
    ),
]
