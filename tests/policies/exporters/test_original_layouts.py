"""Original layouts: diffusers' own converters give back exactly what was exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from toy_originals import ORIGINALS, Original

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.convrot import regular_hadamard
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import stored_weight, to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.exporters.comfy import Comfy
from bitpolicy.policies.exporters.export import export_to
from bitpolicy.policies.exporters.exporter import Layer, config_of
from bitpolicy.policies.exporters.original.families import CLASSES, layout_of
from bitpolicy.policies.exporters.original.layout import Family, Place
from bitpolicy.policies.exporters.requantize import TargetError
from bitpolicy.policies.policy import Choice

EACH = pytest.mark.parametrize("original", ORIGINALS, ids=lambda original: original.name)
EXACT = "int4-sym int8 int4-convrot64 int3 int8-convrot64 int4-g32-sym fp16 int2 int6-channel-sym".split()
"""Formats whose scales and offsets ComfyUI stores without rounding."""


def on_meta(original: Original, **changed: Any) -> Any:
    with torch.device("meta"):
        return original.model(**changed)


def original_rows(rows: dict[str, torch.Tensor], places: dict[str, Place]) -> dict[str, torch.Tensor]:
    """Tensors of diffusers' model in the original layout, from the definition of a `Place`."""
    return {
        place.name: torch.cat(
            [torch.cat(rows[part].chunk(2)[::-1]) if place.swapped else rows[part] for part in place.parts]
        )
        for place in places.values()
    }


def numbered_rows(model: Any) -> dict[str, torch.Tensor]:
    """A vector for each tensor, with a number for each of its rows that no other row has."""
    rows, start = {}, 0
    for name, tensor in model.state_dict().items():
        count = tensor.shape[0] if tensor.ndim else 1
        rows[name], start = torch.arange(start, start + count), start + count
    return rows


def all_formats(model: Any) -> dict[str, Choice]:
    """The next of `EXACT` for each layer, one for tied layers, as far as ComfyUI holds it for them."""
    modules, names = dict(quantizable_layers(model)), cycle(EXACT)
    groups = Comfy().tied(config_of(model), list(modules))
    alone = [[name] for name in modules if not any(name in group for group in groups)]
    found = {}
    for group in (*groups, *alone):
        layers = [Layer.of(name, modules[name], FP16) for name in group]
        candidates = (format_named(next(names)) for _ in range(2 * len(EXACT)))
        format = next(f for f in candidates if all(f.fits(x.shape) and Comfy().holds(x.stored_as(f)) for x in layers))
        found |= dict.fromkeys(group, Choice(format))
    return {name: found[name] for name in modules}


def expected(model: Any, choices: dict[str, Choice]) -> dict[str, torch.Tensor]:
    """The tensors of the packed model, dequantized, float32."""
    tensors = {name: tensor.half().float() for name, tensor in model.state_dict().items()}
    for name, choice in choices.items():
        weight = model.get_submodule(name).weight.detach().half()
        stored = stored_weight(name, weight, choice, Calibration())
        tensors[f"{name}.weight"] = choice.format.dequantize(stored, weight.shape, torch.float32)
    return tensors


def dequantized(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an exported file, float32, as comfy-kitchen's layouts define them."""
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        listed = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    marked = {name.removesuffix(".comfy_quant") for name in stored if name.endswith(".comfy_quant")}
    assert marked == set(listed)
    for name, tensor in stored.items():
        layer, _, leaf = name.rpartition(".")
        if layer not in marked or leaf == "bias":
            yield name, tensor.float()
        elif leaf == "weight":
            assert json.loads(bytes(stored[f"{layer}.comfy_quant"].numpy())) == listed[layer]
            yield (
                name,
                _weight(
                    listed[layer], {k.rpartition(".")[2]: t for k, t in stored.items() if k.startswith(f"{layer}.")}
                ),
            )


def _weight(marker: dict[str, Any], stored: dict[str, torch.Tensor]) -> torch.Tensor:
    codes, scale = stored["weight"], stored["weight_scale"].float()
    if marker["format"] == "int8_tensorwise":
        rows = codes.float() * scale
        return regular_hadamard(rows, marker["convrot_groupsize"]) if marker.get("convrot") else rows
    nibbles = torch.stack([codes.view(torch.uint8) & 15, codes.view(torch.uint8) >> 4], dim=-1).flatten(1).float()
    if marker["format"] == "convrot_w4a4":
        return regular_hadamard(
            torch.where(nibbles < 8, nibbles, nibbles - 16) * scale[:, None], marker["convrot_groupsize"]
        )
    assert marker["format"] == "awq_w4a16"
    grouped = nibbles.unflatten(1, (-1, marker["group_size"])) - 8
    return (grouped * scale.mT[..., None] + stored["weight_zeros"].float().mT[..., None]).flatten(1)


def test_every_known_class_is_tested() -> None:
    assert {original.class_name for original in ORIGINALS} | {"UNet2DConditionModel"} == set(CLASSES)


@EACH
def test_diffusers_finds_every_row_of_the_real_model_where_it_was(original: Original) -> None:
    """diffusers' converter, unchanged, on vectors that number the rows of a model of the real width."""
    model = on_meta(original, **original.real)
    rows = numbered_rows(model)
    found = original.convert(original_rows(rows, layout_of(config_of(model)).places(rows)))
    assert found.keys() == rows.keys()
    assert [name for name, numbers in rows.items() if not torch.equal(found[name], numbers)] == []


RECOGNIZED = {
    "AuraFlowTransformer2DModel": "double_layers.0.attn.w1q.weight positional_encoding cond_seq_linear.weight",
    "ChromaTransformer2DModel": "double_blocks.0.img_attn.norm.key_norm.scale distilled_guidance_layer.norms.0.scale",
    "CosmosTransformer3DModel": "blocks.block0.blocks.0.block.attn.to_q.0.weight x_embedder.proj.1.weight",
    "CosmosTransformer3DModel-2": "blocks.0.mlp.layer1.weight x_embedder.proj.1.weight",
    "Flux2Transformer2DModel": "double_blocks.0.img_attn.norm.key_norm.scale double_stream_modulation_img.lin.weight",
    "FluxTransformer2DModel": "double_blocks.0.img_attn.norm.key_norm.scale img_in.weight guidance_in.in_layer.weight",
    "HiDreamImageTransformer2DModel": "caption_projection.0.linear.weight",
    "HunyuanImageTransformer2DModel": "txt_in.individual_token_refiner.blocks.0.norm1.weight byt5_in.fc1.weight",
    "HunyuanVideo15Transformer3DModel": "img_in.proj.weight vision_in.proj.0.weight cond_type_embedding.weight",
    "HunyuanVideoTransformer3DModel": "txt_in.individual_token_refiner.blocks.0.norm1.weight img_in.proj.weight",
    "LTX2VideoTransformer3DModel": "adaln_single.emb.timestep_embedder.linear_1.bias audio_adaln_single.linear.weight",
    "LTXVideoTransformer3DModel": "adaln_single.emb.timestep_embedder.linear_1.bias",
    "Lumina2Transformer2DModel": "cap_embedder.1.weight noise_refiner.0.attention.k_norm.weight",
    "MochiTransformer3DModel": "t5_yproj.weight",
    "PixArtTransformer2DModel": "t_block.1.weight",
    "PixArtTransformer2DModel-alpha": "t_block.1.weight ar_embedder.mlp.0.weight",
    "QwenImageTransformer2DModel": "txt_norm.weight img_in.weight",
    "SD3Transformer2DModel": "joint_blocks.0.context_block.attn.qkv.weight x_embedder.proj.weight pos_embed",
    "WanTransformer3DModel": "head.modulation head.head.weight blocks.0.ffn.0.weight patch_embedding.weight",
    "WanTransformer3DModel-I2V": "head.modulation img_emb.proj.0.bias",
    "WanVACETransformer3DModel": "head.modulation vace_patch_embedding.weight vace_blocks.0.before_proj.weight",
    "ZImageTransformer2DModel": "cap_embedder.1.weight noise_refiner.0.attention.k_norm.weight cap_pad_token",
}
"""Tensors by which ComfyUI recognizes a model (comfy/model_detection.py, `detect_unet_config`)."""


@EACH
def test_a_model_has_the_tensors_by_which_comfy_recognizes_it(original: Original) -> None:
    model = on_meta(original)
    places = layout_of(config_of(model)).places(model.state_dict())
    assert set(RECOGNIZED[original.name].split()) <= {place.name for place in places.values()}


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel"])
def test_merged_layers_of_flux_have_their_published_names(name: str) -> None:
    """Flux.2's converter accepts any name that contains `qkv`."""
    model = on_meta(next(original for original in ORIGINALS if original.name == name))
    places = layout_of(config_of(model)).places(model.state_dict())
    found = {place.name for place in places.values() if len(place.parts) > 1 and place.name.endswith("weight")}
    single = set() if name.startswith("Flux2") else {"single_blocks.0.linear1.weight"}
    assert found == {"double_blocks.0.img_attn.qkv.weight", "double_blocks.0.txt_attn.qkv.weight", *single}


@EACH
def test_diffusers_reads_back_exactly_the_weights_that_were_exported(
    original: Original, policy_of: Any, parts_of: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = original.model()
    to_storage(model, torch.float16)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter.data).copy_(parameter.data.half())
    choices = all_formats(model)
    assert len({choice.format for choice in choices.values()}) >= 5
    exported = export_to(
        "comfy", parts_of(transformer=model), policy_of(model, choices), Calibration(), tmp_path / "out"
    )
    assert exported.requantized == ()
    found = original.convert(dict(dequantized(tmp_path / "out" / "transformer.safetensors")), toy=True)
    wanted = expected(model, choices)
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []


FLUX = next(original for original in ORIGINALS if original.name == "FluxTransformer2DModel")
IMAGE, TEXT = (
    [f"transformer_blocks.0.attn.{name}" for name in names.split()]
    for names in ("to_q to_k to_v", "add_q_proj add_k_proj add_v_proj")
)


def mixed(model: Any, **formats: str) -> dict[str, Choice]:
    """INT8, except for some layers of the first attention."""
    given = {f"transformer_blocks.0.attn.{name}": format_named(format) for name, format in formats.items()}
    return {name: Choice(given.get(name, format_named("int8"))) for name, _ in quantizable_layers(model)}


def test_a_policy_that_stores_merged_layers_apart_is_refused_with_their_names(
    policy_of: Any, parts_of: Any, tmp_path: Path
) -> None:
    model = FLUX.model()
    policy = policy_of(model, mixed(model, to_k="int4-sym", add_q_proj="fp16"))
    with pytest.raises(TargetError) as refused:
        export_to("comfy", parts_of(transformer=model), policy, Calibration(), tmp_path / "out")
    (line,) = str(refused.value).splitlines()
    first, second = (", ".join(f"{name} in %s" for name in group) for group in (IMAGE, TEXT))
    assert first % ("int8", "int4-sym", "int8") in line
    assert second % ("fp16", "int8", "int8") in line
    assert "2 groups of layers" in line
    assert "--target comfy" in line
    assert list(tmp_path.iterdir()) == []


def test_merged_layers_cannot_have_a_scale_of_the_whole_tensor_and_others_can(
    policy_of: Any, parts_of: Any, tmp_path: Path
) -> None:
    """One scale would have to serve all of them. The swapped halves of a final layer may share one."""
    model = FLUX.model()
    to_storage(model, torch.float16)
    names = [name for name, _ in quantizable_layers(model)]
    choices = {name: Choice(format_named("fp8-tensor")) for name in names}
    with pytest.raises(TargetError) as refused:
        export_to("comfy", parts_of(transformer=model), policy_of(model, choices), Calibration(), tmp_path / "out")
    assert IMAGE[0] in str(refused.value)
    assert "norm_out" not in str(refused.value)

    alone = {name: Choice(format_named("fp8-tensor" if name == "norm_out.linear" else "int8")) for name in names}
    export_to("comfy", parts_of(transformer=model), policy_of(model, alone), Calibration(), tmp_path / "out")
    with safe_open(tmp_path / "out" / "transformer.safetensors", "pt") as file:
        layer = "final_layer.adaLN_modulation.1"
        back = file.get_tensor(f"{layer}.weight").float() * file.get_tensor(f"{layer}.weight_scale")
    weight = dict(model.named_modules())["norm_out.linear"].weight.detach().half()
    format = format_named("fp8-tensor")
    rounded = format.dequantize(format.quantize(weight), weight.shape, torch.float32)
    assert torch.equal(back, torch.cat(rounded.chunk(2)[::-1]))


def test_requantizing_gives_merged_layers_the_widest_of_their_formats(
    policy_of: Any, parts_of: Any, tmp_path: Path
) -> None:
    """`fp8` is first replaced by the nearest format of ComfyUI, `int8`."""
    model = FLUX.model()
    to_storage(model, torch.float16)
    policy = policy_of(model, mixed(model, to_q="int4-sym", to_k="fp8", to_v="int4-sym", add_q_proj="fp16"))
    out = tmp_path / "out"
    exported = export_to("comfy", parts_of(transformer=model), policy, Calibration(), out, requantize=True)
    after = {one.name: one.after.format.name for one in exported.requantized}
    assert after == {**dict.fromkeys(IMAGE, "int8"), **dict.fromkeys(TEXT[1:], "fp16")}
    with safe_open(out / "transformer.safetensors", "pt") as file:
        assert file.get_tensor("double_blocks.0.img_attn.qkv.weight").dtype == torch.int8
        assert file.get_tensor("double_blocks.0.txt_attn.qkv.weight").dtype == torch.float16


def test_one_layer_of_a_group_without_the_others_is_an_error() -> None:
    family = Family({"attn.{to_q,to_k}": "qk"})
    with pytest.raises(
        BitPolicyError, match=r"merges attn\.to_q\.weight with attn\.to_k\.weight, which this model does"
    ):
        family.places(["attn.to_q.weight"])


def test_the_longest_rule_applies_and_a_number_is_no_part_of_a_longer_one() -> None:
    rules = {"blocks.*": "b.*", "blocks.*.norm.weight": "b.*.scale", "out": "last"}
    places = Family(rules, same=True).places(
        ["blocks.1.norm.weight", "blocks.12.norm.bias", "outer.weight", "out.bias"]
    )
    assert [place.name for place in places.values()] == ["b.1.scale", "b.12.norm.bias", "outer.weight", "last.bias"]
    assert not any(place.swapped for place in places.values())


def test_a_setting_that_comfy_reads_from_the_presence_of_a_tensor_is_written(
    policy_of: Any, parts_of: Any, tmp_path: Path
) -> None:
    qwen = next(original for original in ORIGINALS if original.name == "QwenImageTransformer2DModel")
    names = {}
    for zero in (True, False):
        model = qwen.model(zero_cond_t=zero)
        policy = policy_of(model, {name: Choice(FP16) for name, _ in quantizable_layers(model)})
        export_to("comfy", parts_of(transformer=model), policy, Calibration(), tmp_path / str(zero))
        with safe_open(tmp_path / str(zero) / "transformer.safetensors", "pt") as file:
            names[zero] = set(file.keys())
    assert names[True] - names[False] == {"__index_timestep_zero__"}
    assert names[False] == set(model.state_dict())
