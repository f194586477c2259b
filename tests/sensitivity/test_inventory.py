"""The inventory of layers with roles and stages: of small models, and of published models built without weights."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableAudio3DiTModel,
    UNet2DModel,
    WanTransformer3DModel,
)
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import pack
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.inventory import Layer, inventory, warn_of_unsupported

SCRIPT = Path(__file__).parents[2] / "scripts" / "published_configs.py"
spec = importlib.util.spec_from_file_location("published_configs", SCRIPT)
assert spec is not None
assert spec.loader is not None
published_configs: Any = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = published_configs  # where dataclasses look for the types of their fields
spec.loader.exec_module(published_configs)

ALL = list(published_configs.PUBLISHED)
UNETS = [name for name in ALL if "UNet" in published_configs.PUBLISHED[name].kind]
CONDITIONED_UNETS = [name for name in UNETS if name != "ddpm-cifar10-32"]
TRANSFORMERS = [name for name in ALL if "Transformer" in published_configs.PUBLISHED[name].kind] + ["HunyuanDiT-v1.2"]
WORDS = (
    "input_stem conv shortcut resample attention_qkv attention_out cross_attention_qkv cross_attention_out "
    "feed_forward projection timestep_embedding modulation context_embedding output_head"
).split()


@cache
def published(name: str) -> Any:
    return published_configs.published(name)


@cache
def described(name: str) -> dict[str, Layer]:
    return by_name(inventory(Target({"unet": published(name)})))


def by_name(layers: list[Layer]) -> dict[str, Layer]:
    return {layer.name: layer for layer in layers}


def with_role(name: str, role: str) -> list[str]:
    return [layer.name for layer in described(name).values() if layer.role == role]


def only_match(patterns: dict[str, str], name: str) -> str:
    (value,) = [value for pattern, value in patterns.items() if re.fullmatch(pattern, name)]
    return value


# A small U-Net, layer by layer

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
    r"(?!(down_blocks|mid_block|up_blocks)\.).*": "ends",
}


def test_every_weight_of_two_or_more_dimensions_is_listed_exactly_once(toy_unet: Any) -> None:
    listed = [layer.name for layer in inventory(Target({"unet": toy_unet}))]
    weights = {
        n.removesuffix(".weight") for n, t in toy_unet.state_dict().items() if n.endswith("weight") and t.ndim > 1
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == weights


def test_every_layer_of_a_small_unet_has_the_expected_role(toy_unet: Any) -> None:
    layers = inventory(Target({"unet": toy_unet}))
    assert {layer.name: layer.role for layer in layers} == {
        layer.name: only_match(ROLES, layer.name) for layer in layers
    }
    assert {layer.role for layer in layers} == set(ROLES.values())


def test_a_layer_is_described_with_its_torch_class_and_shape(toy_unet: Any) -> None:
    layers = by_name(inventory(Target({"unet": toy_unet})))
    for name, layer in layers.items():
        module = toy_unet.get_submodule(name)
        assert (layer.kind, layer.shape) == (type(module).__name__, tuple(module.weight.shape))
        assert layer.has_bias == (f"{name}.bias" in toy_unet.state_dict())
    assert layers["conv_in"].group == "input_stem/ends"


def test_projections_fused_by_diffusers_are_still_attention(toy_unet: Any) -> None:
    toy_unet.fuse_qkv_projections()
    fused = {
        layer.name: layer.role
        for layer in inventory(Target({"unet": toy_unet}))
        if re.search(r"to_(qkv|kv)$", layer.name)
    }
    assert set(fused.values()) == {"attention_qkv", "cross_attention_qkv"}
    assert all(role.startswith("cross") == ("attn2" in name) for name, role in fused.items())


# The published models


@pytest.mark.parametrize("name", ALL)
def test_a_published_configuration_has_the_published_number_of_parameters(name: str) -> None:
    built = published_configs.parameter_count(published(name))
    assert built == pytest.approx(published_configs.PUBLISHED[name].parameters, rel=0.005)


def test_sdxl_has_794_layers() -> None:
    assert len(described("stable-diffusion-xl-base-1.0")) == 794


@pytest.mark.parametrize("name", ALL)
def test_every_layer_of_a_published_model_has_a_role(name: str) -> None:
    assert [layer.name for layer in described(name).values() if layer.role not in WORDS] == []


ENDS: dict[str, tuple[list[str], list[str]]] = {
    **{name: (["conv_in"], ["conv_out"]) for name in UNETS},
    "sd-controlnet-canny": (["conv_in"], [*(f"controlnet_down_blocks.{i}" for i in range(12)), "controlnet_mid_block"]),
    "DiT-XL-2-256": (["pos_embed.proj"], ["proj_out_2"]),
    "PixArt-Sigma-XL-2-1024-MS": (["pos_embed.proj"], ["proj_out"]),
    "HunyuanDiT-v1.2": (["pos_embed.proj"], ["proj_out"]),
    "stable-diffusion-3-medium": (["pos_embed.proj"], ["proj_out"]),
    "AuraFlow-v0.3": (["pos_embed.proj"], ["proj_out"]),
    "FLUX.1-dev": (["x_embedder"], ["proj_out"]),
    "Sana_1600M_1024px": (["patch_embed.proj"], ["proj_out"]),
    "Lumina-Image-2.0": (["x_embedder"], ["norm_out.linear_2"]),
    "Qwen-Image": (["img_in"], ["proj_out"]),
    "Z-Image-Turbo": (["all_x_embedder.2-1"], ["all_final_layer.2-1.linear"]),
    "CogVideoX-2b": (["patch_embed.proj"], ["proj_out"]),
    "HunyuanVideo": (["x_embedder.proj"], ["proj_out"]),
    "LTX-Video": (["proj_in"], ["proj_out"]),
    "Wan2.1-T2V-1.3B": (["patch_embedding"], ["proj_out"]),
    "Wan2.2-T2V-A14B": (["patch_embedding"], ["proj_out"]),
}


@pytest.mark.parametrize("name", ALL)
def test_the_input_stem_and_the_output_head_are_found(name: str) -> None:
    assert (with_role(name, "input_stem"), with_role(name, "output_head")) == ENDS[name]


@pytest.mark.parametrize("name", ALL)
def test_exactly_the_layers_in_diffusers_attention_modules_are_attention(name: str) -> None:
    attending = [n for n, m in published(name).named_modules() if isinstance(m, Attention | AttentionModuleMixin)]
    within = {layer for layer in described(name) if any(layer.startswith(f"{module}.") for module in attending)}
    assert {layer.name for layer in described(name).values() if "attention" in layer.role} == within
    assert within


@pytest.mark.parametrize("name", ALL)
def test_output_projections_of_attention_are_distinguished_from_input_projections(name: str) -> None:
    for layer in described(name).values():
        if "attention" in layer.role:
            assert layer.role.endswith("_out" if re.search(r"\.to_(add_)?out\b", layer.name) else "_qkv"), layer.name


@pytest.mark.parametrize("name", CONDITIONED_UNETS)
def test_attention_of_a_unet_is_cross_attention_if_its_keys_are_as_wide_as_the_text(name: str) -> None:
    """The width of the text differs from all widths of a U-Net. Motion modules have two self-attentions."""
    layers = described(name)
    keys = [layer for layer in layers.values() if layer.name.endswith(".to_k")]
    for key in keys:
        assert key.role.startswith("cross") == (key.shape[1] == published(name).config["cross_attention_dim"]), key
        for sibling in ("to_q", "to_v", "to_out.0"):
            assert layers[key.name.removesuffix("to_k") + sibling].role.startswith("cross") == key.role.startswith(
                "cross"
            )
    assert {key.role for key in keys} == {"attention_qkv", "cross_attention_qkv"}


IN_CONTEXT = {
    **dict.fromkeys(["PixArt-Sigma-XL-2-1024-MS", "HunyuanDiT-v1.2", "Sana_1600M_1024px", "LTX-Video"], r"\.attn2\."),
    **dict.fromkeys(["Wan2.1-T2V-1.3B", "Wan2.2-T2V-A14B"], r"\.attn2\."),
    **dict.fromkeys(["stable-diffusion-3-medium", "AuraFlow-v0.3", "FLUX.1-dev"], r"\.(add_[qkv]_proj|to_add_out)$"),
    **dict.fromkeys(["Qwen-Image", "HunyuanVideo"], r"\.(add_[qkv]_proj|to_add_out)$"),
    # one attention reads the texts as part of the sequence
    **dict.fromkeys(["DiT-XL-2-256", "CogVideoX-2b", "Lumina-Image-2.0", "Z-Image-Turbo"], "(?!)"),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_attention_of_a_transformer_is_cross_attention_if_it_reads_the_context(name: str) -> None:
    found = {layer.name for layer in described(name).values() if layer.role.startswith("cross_attention")}
    assert found == {layer for layer in described(name) if re.search(IN_CONTEXT[name], layer)}


KNOWN = {
    "ddpm-cifar10-32": {"mid_block.attentions.0.to_q": "attention_qkv/middle"},
    "stable-diffusion-xl-base-1.0": {
        "add_embedding.linear_1": "timestep_embedding/ends",
        "up_blocks.0.upsamplers.0.conv": "resample/decoder",
        "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0": "cross_attention_out/middle",
    },
    "text-to-video-ms-1.7b": {
        "transformer_in.proj_in": "projection/ends",
        "transformer_in.transformer_blocks.0.attn1.to_q": "attention_qkv/ends",
        "down_blocks.0.temp_convs.0.conv4.3": "conv/encoder",
        "up_blocks.1.temp_attentions.0.transformer_blocks.0.attn2.to_k": "attention_qkv/decoder",
    },
    "animatediff-v1-5-2": {
        "down_blocks.0.motion_modules.0.proj_in": "projection/encoder",
        "mid_block.motion_modules.0.transformer_blocks.0.attn2.to_v": "attention_qkv/middle",
        "up_blocks.3.motion_modules.2.transformer_blocks.0.ff.net.2": "feed_forward/decoder",
    },
    "stable-video-diffusion-img2vid": {
        "down_blocks.0.resnets.0.temporal_res_block.conv1": "conv/encoder",
        "down_blocks.0.resnets.0.temporal_res_block.time_emb_proj": "timestep_embedding/encoder",
        "down_blocks.1.resnets.0.spatial_res_block.conv_shortcut": "shortcut/encoder",
        "down_blocks.0.attentions.0.time_pos_embed.linear_1": "timestep_embedding/encoder",
        "mid_block.attentions.0.temporal_transformer_blocks.0.ff_in.net.2": "feed_forward/middle",
        "up_blocks.1.attentions.0.temporal_transformer_blocks.0.attn2.to_k": "cross_attention_qkv/decoder",
    },
    "sd-controlnet-canny": {
        "controlnet_cond_embedding.conv_in": "context_embedding/ends",
        "controlnet_cond_embedding.blocks.1": "context_embedding/ends",
        "down_blocks.0.downsamplers.0.conv": "resample/encoder",
    },
    "DiT-XL-2-256": {
        "transformer_blocks.27.norm1.emb.timestep_embedder.linear_1": "timestep_embedding/late",
        "transformer_blocks.0.norm1.linear": "modulation/early",
        "proj_out_1": "modulation/ends",
    },
    "PixArt-Sigma-XL-2-1024-MS": {
        "adaln_single.linear": "modulation/ends",
        "adaln_single.emb.timestep_embedder.linear_2": "timestep_embedding/ends",
        "caption_projection.linear_1": "context_embedding/ends",
    },
    "HunyuanDiT-v1.2": {
        "time_extra_emb.pooler.q_proj": "context_embedding/ends",
        "time_extra_emb.extra_embedder.linear_1": "context_embedding/ends",
        "text_embedder.linear_2": "context_embedding/ends",
        "blocks.0.norm1.linear": "modulation/early",
        "blocks.39.skip_linear": "projection/late",
    },
    "stable-diffusion-3-medium": {
        "context_embedder": "context_embedding/ends",
        "time_text_embed.text_embedder.linear_1": "context_embedding/ends",
        "transformer_blocks.0.norm1_context.linear": "modulation/early",
        "transformer_blocks.0.ff_context.net.2": "feed_forward/early",
        "norm_out.linear": "modulation/ends",
    },
    "FLUX.1-dev": {
        "time_text_embed.guidance_embedder.linear_1": "timestep_embedding/ends",
        "transformer_blocks.18.attn.to_add_out": "cross_attention_out/early",
        "single_transformer_blocks.0.proj_mlp": "feed_forward/middle",
        "single_transformer_blocks.18.proj_out": "feed_forward/middle",
        "single_transformer_blocks.19.norm.linear": "modulation/late",
    },
    "Sana_1600M_1024px": {
        "time_embed.linear": "modulation/ends",
        "transformer_blocks.0.ff.conv_depth": "feed_forward/early",
        "transformer_blocks.0.ff.conv_inverted": "feed_forward/early",
    },
    "Lumina-Image-2.0": {
        "norm_out.linear_1": "modulation/ends",
        "time_caption_embed.caption_embedder.1": "context_embedding/ends",
        "context_refiner.0.attn.to_q": "attention_qkv/early",
        "layers.25.feed_forward.linear_3": "feed_forward/late",
    },
    "Qwen-Image": {
        "txt_in": "context_embedding/ends",
        "transformer_blocks.0.img_mod.1": "modulation/early",
        "transformer_blocks.59.txt_mlp.net.2": "feed_forward/late",
    },
    "Z-Image-Turbo": {
        "t_embedder.mlp.0": "timestep_embedding/ends",
        "cap_embedder.1": "context_embedding/ends",
        "all_final_layer.2-1.adaLN_modulation.1": "modulation/ends",
        "layers.29.adaLN_modulation.0": "modulation/late",
    },
    "CogVideoX-2b": {
        "patch_embed.text_proj": "context_embedding/ends",
        "transformer_blocks.15.norm2.linear": "modulation/middle",
    },
    "HunyuanVideo": {
        "context_embedder.proj_in": "context_embedding/ends",
        "context_embedder.token_refiner.refiner_blocks.0.attn.to_q": "attention_qkv/ends",
        "context_embedder.token_refiner.refiner_blocks.1.ff.net.2": "feed_forward/ends",
        "context_embedder.token_refiner.refiner_blocks.1.norm_out.linear": "modulation/ends",
    },
    "LTX-Video": {"time_embed.linear": "modulation/ends", "caption_projection.linear_2": "context_embedding/ends"},
    "Wan2.1-T2V-1.3B": {
        "condition_embedder.time_proj": "modulation/ends",
        "condition_embedder.time_embedder.linear_1": "timestep_embedding/ends",
        "condition_embedder.text_embedder.linear_1": "context_embedding/ends",
        "blocks.29.ffn.net.0.proj": "feed_forward/late",
    },
}


@pytest.mark.parametrize("name", KNOWN)
def test_well_known_layers_have_the_expected_role(name: str) -> None:
    assert {layer: described(name)[layer].group for layer in KNOWN[name]} == KNOWN[name]


# The stages


@pytest.mark.parametrize("name", [*UNETS, "sd-controlnet-canny"])
def test_the_stages_of_a_unet_are_its_halves_and_its_middle(name: str) -> None:
    layers = described(name).values()
    assert {layer.name: layer.stage for layer in layers} == {
        layer.name: only_match(STAGES, layer.name) for layer in layers
    }


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_stages_of_a_transformer_are_thirds_of_its_depth(name: str) -> None:
    in_stacks = [layer for layer in described(name).values() if re.match(r"(?!all_)\w+\.\d+\.", layer.name)]
    blocks = {tuple(layer.name.split(".")[:2]): layer.stage for layer in in_stacks}
    places = [("early", "middle", "late").index(stage) for stage in blocks.values()]
    assert places == sorted(places)
    assert max(Counter(places).values()) - min(Counter(places).values()) <= 1
    others = set(described(name)) - {layer.name for layer in in_stacks}
    assert {described(name)[layer].stage for layer in others} == {"ends"}


def test_the_two_stacks_of_flux_share_one_depth() -> None:
    stages = Counter(layer.stage for layer in described("FLUX.1-dev").values() if layer.name.endswith("attn.to_q"))
    assert stages == {"early": 19, "middle": 19, "late": 19}


# Several denoisers


def test_denoisers_probed_together_are_described_as_if_alone() -> None:
    names = {"transformer": "Wan2.1-T2V-1.3B", "transformer_2": "FLUX.1-dev", "unet": "stable-diffusion-v1-5"}
    together = inventory(Target({key: published(name) for key, name in names.items()}))
    apart = [(f"{key}.{n}", layer) for key, name in names.items() for n, layer in described(name).items()]
    assert [(layer.name, layer.group, layer.shape) for layer in together] == [
        (name, layer.group, layer.shape) for name, layer in apart
    ]


def test_denoisers_without_any_quantizable_layer_are_refused() -> None:
    with pytest.raises(BitPolicyError, match="no linear or convolution"):
        inventory(Target({"transformer": nn.Identity(), "transformer_2": nn.Identity()}))


# Other models


class Mixer(nn.Module):
    """A block unlike any published one."""

    def __init__(self) -> None:
        super().__init__()
        self.stir = nn.Linear(4, 4)
        self.fold = nn.Conv2d(4, 4, 1)
        self.blur = nn.Conv2d(4, 4, 3)
        self.halve = nn.Conv2d(4, 4, 2, stride=2)


class Kitchen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(Mixer() for _ in range(3))
        self.pan = nn.Linear(4, 4)
        self.rack = nn.ModuleList([nn.Linear(4, 4)])


def test_a_layer_that_matches_no_rule_is_other_unless_its_kernel_covers_several_positions() -> None:
    stages = ("early", "middle", "late")
    assert {layer.name: layer.group for layer in inventory(Target({"unet": Kitchen()}))} == {
        **{f"mixers.{i}.stir": f"other/{stage}" for i, stage in enumerate(stages)},
        **{f"mixers.{i}.fold": f"other/{stage}" for i, stage in enumerate(stages)},
        **{f"mixers.{i}.blur": f"conv/{stage}" for i, stage in enumerate(stages)},
        **{f"mixers.{i}.halve": f"resample/{stage}" for i, stage in enumerate(stages)},
        "pan": "other/ends",
        "rack.0": "other/ends",
    }


class Reading(nn.Module):
    """Cross attention without diffusers' flag, to a context of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(4, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        self.to_out = nn.Linear(4, 4)


class Library(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shelves = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))
        self.rooms = nn.ModuleList(nn.ModuleDict({"look": Reading(), "think": Mixer()}) for _ in range(3))


def test_attention_from_other_libraries_is_recognized_by_its_projections() -> None:
    groups = {layer.name: layer.group for layer in inventory(Target({"unet": Library()}))}
    assert groups["shelves.0.0"] == groups["shelves.1.0"] == "other/ends"
    assert groups["rooms.0.look.to_v"] == "cross_attention_qkv/early"
    assert groups["rooms.1.look.to_out"] == "cross_attention_out/middle"
    assert groups["rooms.2.think.stir"] == "feed_forward/late"


def test_equal_widths_do_not_confuse_stem_and_head() -> None:
    """The sample, the text and the trunk all have 32 channels, and the last norm writes as many as the head."""
    flux = FluxTransformer2DModel(
        in_channels=32,
        out_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    ends = {
        layer.name: layer.role
        for layer in inventory(Target({"unet": flux}))
        if layer.stage == "ends" and "time" not in layer.name
    }
    assert ends == {
        "context_embedder": "context_embedding",
        "x_embedder": "input_stem",
        "norm_out.linear": "modulation",
        "proj_out": "output_head",
    }


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
    layers = by_name(inventory(Target({"unet": model})))
    stages = [layers[f"transformer_blocks.{i}.attn2.to_q"].stage for i in range(6)]
    assert stages == ["early", "early", "middle", "middle", "late", "late"]
    assert "other" not in {layer.role for layer in layers.values()}


def test_the_second_attention_of_stable_diffusion_3_5_attends_to_the_sample() -> None:
    model = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )
    roles = {layer.name: layer.role for layer in inventory(Target({"unet": model}))}
    assert roles["transformer_blocks.0.attn2.to_k"] == "attention_qkv"
    assert roles["transformer_blocks.0.attn.add_k_proj"] == "cross_attention_qkv"


def test_an_image_that_guides_a_video_is_context() -> None:
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        image_dim=20,
        added_kv_proj_dim=24,
    )
    roles = {layer.name: layer.role for layer in inventory(Target({"unet": model}))}
    image = [role for name, role in roles.items() if name.startswith("condition_embedder.image_embedder.")]
    assert image == ["context_embedding"] * 2
    assert roles["blocks.0.attn2.add_k_proj"] == "cross_attention_qkv"
    assert [name for name, role in roles.items() if role == "input_stem"] == ["patch_embedding"]
    assert "other" not in roles.values()


def test_channels_of_a_sound_have_other_names() -> None:
    """Stable Audio 3 has `io_channels`; its 1x1 convolutions at both ends and the length's embedding are no `other`."""
    model = StableAudio3DiTModel(
        io_channels=8,
        embed_dim=32,
        depth=1,
        num_heads=4,
        cond_token_dim=16,
        global_cond_dim=16,
        local_add_cond_dim=9,
        timestep_features_dim=16,
    )
    roles = {layer.name: layer.role for layer in inventory(Target({"unet": model}))}
    assert "other" not in roles.values()
    assert {roles["preprocess_conv"], roles["proj_in"]} == {"input_stem"}
    assert {roles["postprocess_conv"], roles["proj_out"]} == {"output_head"}
    assert roles["to_global_embed.0"] == "timestep_embedding"


def test_a_unet_that_scales_and_resamples_in_its_residual_blocks_has_no_other_layers() -> None:
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
    )
    roles = {layer.name: layer.role for layer in inventory(Target({"unet": model}))}
    assert roles["down_blocks.0.downsamplers.0.conv1"] == "conv"
    assert roles["down_blocks.0.downsamplers.0.time_emb_proj"] == "timestep_embedding"
    assert "other" not in roles.values()


# What is refused


def test_a_packed_model_is_refused(toy_unet: Any) -> None:
    names = [name for name, _ in quantizable_layers(toy_unet)]
    pack(toy_unet, dict.fromkeys(names, Choice(format_named("int8"))), quantization=Quantization())
    with pytest.raises(BitPolicyError, match="is already packed"):
        inventory(Target({"unet": toy_unet}))


def test_a_partly_packed_model_is_refused(toy_unet: Any) -> None:
    pack(toy_unet, {"conv_in": Choice(format_named("int8"))}, quantization=Quantization())
    with pytest.raises(BitPolicyError, match="is already packed"):
        inventory(Target({"text_encoder": nn.Linear(2, 2), "unet": toy_unet}))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(BitPolicyError, match="no linear or convolution"):
        inventory(Target({"unet": nn.Sequential(nn.GroupNorm(2, 4))}))


def test_one_warning_names_layers_that_cannot_be_packed_by_kind() -> None:
    model = nn.Sequential(nn.Linear(2, 2), *(nn.ConvTranspose2d(1, 1, 1) for _ in range(4)), nn.Bilinear(2, 2, 2))
    with pytest.warns(UserWarning, match=r"not quantized") as found:
        warn_of_unsupported(model)
    assert len(found) == 1
    assert "4 ConvTranspose2d (1, 2, 3, ...); 1 Bilinear (5)" in str(found[0].message)


def test_a_model_whose_layers_can_all_be_packed_gives_no_warning(toy_unet: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unsupported(toy_unet)
