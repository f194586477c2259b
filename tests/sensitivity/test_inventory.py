"""Every layer once, with its role and its place, told from the names that diffusers gives to them."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats import format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import pack
from bitpolicy.policies.policy import Choice
from bitpolicy.sensitivity.inventory import Layer, inventory

ROLES = {
    r"conv_in": "input_stem",
    r"conv_out": "output_head",
    r"time_embedding\.linear_[12]": "timestep_embedding",
    r".*\.resnets\.\d\.time_emb_proj": "timestep_embedding",
    r".*\.resnets\.\d\.conv[12]": "conv",
    r".*\.resnets\.\d\.conv_shortcut": "shortcut",
    r".*\.(down|up)samplers\.0\.conv": "resample",
    r".*\.attentions\.\d\.proj_(in|out)": "projection",
    r".*\.attn1\.to_[qkv]": "attention_qkv",
    r".*\.attn1\.to_out\.0": "attention_out",
    r".*\.attn2\.to_[qkv]": "cross_attention_qkv",
    r".*\.attn2\.to_out\.0": "cross_attention_out",
    r".*\.ff\.net\.(0\.proj|2)": "feed_forward",
}
STAGES = {
    r"down_blocks\..*": "encoder",
    r"mid_block\..*": "middle",
    r"up_blocks\..*": "decoder",
    r"(conv_in|conv_out|time_embedding)\b.*": "ends",
}


def only_match(patterns: dict[str, str], name: str) -> str:
    (value,) = [value for pattern, value in patterns.items() if re.fullmatch(pattern, name)]
    return value


def by_name(layers: list[Layer]) -> dict[str, Layer]:
    return {layer.name: layer for layer in layers}


def test_every_weight_of_two_or_more_dimensions_is_listed_exactly_once(toy_unet: Any) -> None:
    listed = [layer.name for layer in inventory(toy_unet)]
    weights = {
        n.removesuffix(".weight") for n, t in toy_unet.state_dict().items() if n.endswith("weight") and t.ndim > 1
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == weights


def test_roles_of_a_unet_follow_from_the_names(toy_unet: Any) -> None:
    layers = inventory(toy_unet)
    assert {layer.name: layer.role for layer in layers} == {
        layer.name: only_match(ROLES, layer.name) for layer in layers
    }
    assert {layer.role for layer in layers} == set(ROLES.values())


def test_stages_of_a_unet_follow_from_the_names(toy_unet: Any) -> None:
    layers = inventory(toy_unet)
    assert {layer.name: layer.stage for layer in layers} == {
        layer.name: only_match(STAGES, layer.name) for layer in layers
    }


def test_a_layer_is_described_as_torch_made_it(toy_unet: Any) -> None:
    layers = by_name(inventory(toy_unet))
    for name, layer in layers.items():
        module = toy_unet.get_submodule(name)
        assert (layer.kind, layer.shape) == (type(module).__name__, tuple(module.weight.shape))
        assert layer.has_bias == (f"{name}.bias" in toy_unet.state_dict())
    assert layers["conv_in"].group == "input_stem/ends"


def test_a_transformer_is_staged_by_depth() -> None:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=6,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=16,
        norm_num_groups=4,
    )
    layers = by_name(inventory(model))
    stages = [layers[f"transformer_blocks.{i}.attn2.to_q"].stage for i in range(6)]
    assert stages == ["early", "early", "middle", "middle", "late", "late"]
    expected = {
        "pos_embed.proj": "input_stem",
        "adaln_single.linear": "modulation",
        "adaln_single.emb.timestep_embedder.linear_1": "timestep_embedding",
        "caption_projection.linear_1": "context_embedding",
        "transformer_blocks.0.attn1.to_v": "attention_qkv",
        "transformer_blocks.0.attn2.to_v": "cross_attention_qkv",
        "transformer_blocks.0.ff.net.2": "feed_forward",
        "proj_out": "output_head",
    }
    assert {name: layers[name].role for name in expected} == expected
    assert "other" not in {layer.role for layer in layers.values()}


def test_flux_has_one_output_head() -> None:
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    roles = Counter(layer.role for layer in inventory(model))
    assert (roles["output_head"], roles["other"]) == (1, 0)


def test_a_packed_model_is_refused(toy_unet: Any) -> None:
    names = [name for name, _ in quantizable_layers(toy_unet)]
    pack(toy_unet, dict.fromkeys(names, Choice(format_named("int8"))), {}, torch.float16)
    with pytest.raises(BitPolicyError, match="packed already"):
        inventory(toy_unet)


def test_a_model_packed_in_part_is_refused(toy_unet: Any) -> None:
    pack(toy_unet, {"conv_in": Choice(format_named("int8"))}, {}, torch.float16)
    with pytest.raises(BitPolicyError, match="packed already"):
        inventory(toy_unet)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(BitPolicyError, match="no linear or convolution"):
        inventory(nn.Sequential(nn.GroupNorm(2, 4)))
