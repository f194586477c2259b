"""ComfyUI: names, markers, and what its layers compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_readers import named

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.exporters.comfy import Comfy
from bitpolicy.policies.exporters.export import export_to
from bitpolicy.policies.exporters.exporter import Layer, config_of
from bitpolicy.policies.exporters.original.families import layout_of
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.target import Target

SMALL = {"sample_size": 8, "cross_attention_dim": 16, "attention_head_dim": 8, "norm_num_groups": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "stable diffusion 1": {
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 2,
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    },
    "stable diffusion xl": {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 3),
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 40,
    },
}


def original_names(model: Any, *more: str) -> dict[str, str]:
    """Name in diffusers -> in the original checkpoint."""
    places = layout_of(config_of(model)).places([*model.state_dict(), *more])
    return {name: place.name for name, place in places.items()}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_names_of_u_nets_are_those_of_the_original_code(config: dict[str, Any]) -> None:
    """diffusers converts every original name back to its own."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SMALL, **config)
    names = original_names(unet)
    assert len(set(names.values())) == len(names)
    assert named(unet, list(names.values())) == names


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ("stable diffusion 1", "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("stable diffusion 1", "up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        ("stable diffusion 1", "up_blocks.2.upsamplers.0.conv.weight", "output_blocks.8.2.conv.weight"),
        ("stable diffusion 1", "down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
        ("stable diffusion xl", "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.2.conv.weight"),
        ("stable diffusion xl", "up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        ("stable diffusion xl", "mid_block.resnets.1.conv1.weight", "middle_block.2.in_layers.2.weight"),
        ("stable diffusion xl", "add_embedding.linear_1.weight", "label_emb.0.0.weight"),
    ],
)
def test_names_match_published_checkpoints(model: str, name: str, expected: str) -> None:
    """diffusers reads both places of an upsampler; published files use one of them."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SMALL, **SHAPES[model])
    assert original_names(unet)[name] == expected


def test_a_name_without_a_place_in_comfy_is_an_error(toy_unet: Any) -> None:
    with pytest.raises(BitPolicyError, match=r"no place for encoder_hid_proj\.weight"):
        original_names(toy_unet, "encoder_hid_proj.weight")


def test_a_class_with_unknown_names_is_refused(policy_of: Any, parts_of: Any, tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8, norm_num_groups=4)
    policy = policy_of(model, {name: Choice(FP16) for name, _ in quantizable_layers(model)})
    with pytest.raises(BitPolicyError, match=r"it knows AuraFlow.*, UNet2DConditionModel.* --target sdnq"):
        export_to("comfy", parts_of(transformer=model), policy, Calibration(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_several_denoisers_get_a_file_each(even_unet: Any, policy_of: Any, parts_of: Any, tmp_path: Path) -> None:
    both = Target({"unet": even_unet(), "other": even_unet()})
    names = list(both.layers)
    policy = policy_of(both, {name: Choice(FP16) for name in names})
    export_to("comfy", parts_of(**both), policy, Calibration(), tmp_path / "out")
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["other.safetensors", "policy.yaml", "unet.safetensors"]


MARKERS = {
    "int8": {"format": "int8_tensorwise"},
    "int6-channel-sym": {"format": "int8_tensorwise"},
    "int8-convrot": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
    "int4-convrot64": {"format": "convrot_w4a4", "convrot_groupsize": 64, "linear_dtype": "int8"},
    "int4": {"format": "awq_w4a16", "group_size": 64},
    "int3-channel": {"format": "awq_w4a16", "group_size": 512},
    "fp8-tensor": {"format": "float8_e4m3fn"},
    "mxfp8": {"format": "mxfp8"},
    "nvfp4": {"format": "nvfp4"},
}


@pytest.mark.parametrize("name", MARKERS)
def test_a_marker_gives_format_and_rotation_and_whether_inputs_are_quantized(name: str) -> None:
    layer = Layer("a", "Linear", (32, 512), format_named(name))
    whole = {} if MARKERS[name]["format"] == "awq_w4a16" else {"full_precision_matrix_mult": True}
    assert Comfy().marker(layer) == {**MARKERS[name], **whole}
    assert Comfy("comfy-int8", quantize_inputs=True).marker(layer) == MARKERS[name]


@pytest.mark.parametrize(
    ("name", "shape", "held"),
    [
        ("int4", (8, 96), False),
        ("int4-g32", (8, 96), True),
        ("int4-channel", (8, 97), False),
        ("int8", (8, 97), True),
        ("int8-g64", (8, 128), False),
        ("int8-asym", (8, 128), False),
        ("int5", (8, 128), False),
        ("int4-rot", (8, 128), False),
        ("fp8", (8, 128), False),
        ("fp8-tensor", (8, 97), True),
        ("mxfp8", (32, 96), True),
        ("mxfp8", (16, 128), False),
        ("mxfp8", (32, 96, 1, 1), False),
        ("mxfp4", (32, 96), False),
        ("nvfp4", (16, 48), True),
        ("nvfp4", (8, 128), False),
        ("nvfp4", (16, 40), False),
        ("nf4", (8, 128), False),
        ("int8", (8, 16, 3, 3), False),
        ("int8", (8, 16, 1, 1), False),
        ("fp16", (8, 16, 3, 3), True),
    ],
)
def test_comfy_holds_what_its_kernels_support(name: str, shape: tuple[int, ...], held: bool) -> None:
    kind = "Linear" if len(shape) == 2 else "Conv2d"
    assert Comfy().holds(Layer("a", kind, shape, format_named(name))) == held


@pytest.mark.parametrize(
    ("name", "halved"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", False),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", False),
        ("add_embedding.linear_1", False),
        ("img_in", False),
        ("down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k", True),
        ("down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k", True),
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", True),
        ("transformer_blocks.0.attn.to_k", True),
        ("add_embedding.linear_2", True),
    ],
)
def test_layers_whose_width_identifies_the_model_keep_their_width(name: str, halved: bool) -> None:
    held = {
        f: Comfy().holds(Layer(name, "Linear", (32, 256), format_named(f)))
        for f in ("int8", "int4", "int4-convrot", "nvfp4", "mxfp8")
    }
    assert held == {"int8": True, "int4": halved, "int4-convrot": halved, "nvfp4": halved, "mxfp8": True}


def in_kitchen(made: dict[str, torch.Tensor], shape: tuple[int, ...], storage: torch.dtype) -> Any:
    """The tensors that we wrote for one layer, as comfy-kitchen's own tensor class."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor", reason="pip install comfy-kitchen")
    marker = json.loads(bytes(made["comfy_quant"].numpy()))
    kind = {
        "int8_tensorwise": "TensorWiseINT8Layout",
        "convrot_w4a4": "TensorCoreConvRotW4A4Layout",
        "float8_e4m3fn": "TensorCoreFP8Layout",
        "mxfp8": "TensorCoreMXFP8Layout",
        "nvfp4": "TensorCoreNVFP4Layout",
    }
    layout = kind.get(marker.pop("format"), "TensorCoreAWQW4A16Layout")
    more = {"zeros": made["weight_zeros"]} if "weight_zeros" in made else {}
    scale = made["weight_scale"]
    if "weight_scale_2" in made:
        scale, more = made["weight_scale_2"], {"block_scale": scale}
    elif layout == "TensorCoreMXFP8Layout":
        scale = scale.view(torch.float8_e8m0fnu)
    params = getattr(kitchen, layout).Params(scale=scale, orig_dtype=storage, orig_shape=shape, **marker, **more)
    return kitchen.QuantizedTensor(made["weight"], layout, params)


@pytest.mark.parametrize("name", MARKERS)
def test_comfys_own_tensors_keep_our_codes_through_its_own_operations(name: str) -> None:
    weight, format = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)), format_named(name)
    made = Comfy("comfy-int8", quantize_inputs=True).convert(
        Layer("a", "Linear", (64, 512), format), format.quantize(weight), torch.float16
    )
    tensor = in_kitchen(made, (64, 512), torch.float16)
    stored = tensor.state_dict("weight")
    assert stored.keys() == made.keys() - {"comfy_quant"}
    assert all(torch.equal(*(t.flatten().view(torch.uint8) for t in (stored[key], made[key]))) for key in stored)
    expected = tensor.dequantize()
    assert expected.shape == weight.shape
    for same in (tensor.detach(), tensor.clone(), tensor.contiguous(), tensor.to("cpu")):
        assert torch.equal(same.dequantize(), expected)
    assert torch.allclose(
        tensor.to(torch.float32).dequantize(), expected.float(), atol=1e-2 * float(expected.abs().max())
    )
    inner, about = tensor.__tensor_flatten__()
    again = type(tensor).__tensor_unflatten__({key: getattr(tensor, key) for key in inner}, about, None, None)
    assert torch.equal(again.dequantize(), expected)


@pytest.mark.parametrize("name", MARKERS)
@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
def test_comfys_own_multiplication_equals_ours_within_its_rounding(name: str, storage: torch.dtype) -> None:
    """Inputs of 8 bits cost a hundredth; comfy-kitchen's plain code gives `convrot_w4a4` inputs of 4 bits, whatever the
    marker says; where inputs stay whole, the storage dtype rounds."""
    draw = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(64, 512, generator=draw), torch.randn(5, 512, generator=draw)
    layer, format = Layer("a", "Linear", (64, 512), format_named(name)), format_named(name)
    tensors = format.quantize(weight)
    made = Comfy("comfy-int8", quantize_inputs=True).convert(layer, tensors, storage)
    specs = Comfy("comfy-int8", quantize_inputs=True).specs(layer, storage)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in made.items()} == {n: (s.dtype, s.shape) for n, s in specs.items()}
    tensor = in_kitchen(made, (64, 512), storage)
    theirs = torch.nn.functional.linear(inputs.to(storage), tensor)
    expected = inputs @ format.dequantize(tensors, weight.shape, torch.float32).mT
    share = float((theirs.float() - expected).norm() / expected.norm())
    whole = "weight_zeros" in made or "variant" in format.parameters()  # inputs stay whole
    rotated = tensor._layout_cls == "TensorCoreConvRotW4A4Layout"
    bound = 0.15 if rotated else 0.012 if storage == torch.bfloat16 or not whole else 0.002
    assert share < bound
