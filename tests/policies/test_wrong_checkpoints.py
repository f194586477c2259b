"""An incomplete checkpoint gives an error that names file and tensor, and never computes with random or empty ones."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from toy_pipelines import TOYS
from transformers import CLIPTextModel

from bitpolicy import BitPolicyConfig, BitPolicyError, load_pipeline
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.checkpoints.component import export_component
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.stored_tensors import stored_tensors

UNET, TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def text_encoder(
    every_format_in_turn: Callable[[nn.Module], dict[str, Choice]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    model = TOYS["StableDiffusionPipeline"].new().text_encoder
    to_storage(model, torch.float16)
    choices = {name: Choice(choice.format) for name, choice in every_format_in_turn(model).items()}
    folder = tmp_path_factory.mktemp("text") / "text_encoder"
    export_component(model, choices, folder, quantization=Quantization())
    return folder


@pytest.fixture(params=["unet", "text_encoder"])
def whole(request: pytest.FixtureRequest, exported: Any, text_encoder: Path, tmp_path: Path) -> tuple[Path, Path, Any]:
    """A copy of a packed model's folder, its file, and its class."""
    if request.param == "unet":
        folder = shutil.copytree(exported.folder / "unet", tmp_path / "copy")
        return folder, folder / UNET, UNet2DConditionModel
    folder = shutil.copytree(text_encoder, tmp_path / "copy")
    return folder, folder / TEXT, CLIPTextModel


def change_tensors(file: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= entries
    (folder / "config.json").write_text(json.dumps(config))


def first(tensors: Tensors, ending: str) -> str:
    return min(name for name in tensors if name.endswith(ending))


@pytest.mark.parametrize("suffix", [".weight_packed", ".weight_scale", ".weight_zero", ".bias", "norm.weight"])
def test_a_missing_tensor_is_named(whole: tuple[Path, Path, Any], suffix: str) -> None:
    folder, file, kind = whole
    name = first(load_file(file), suffix) if suffix != "norm.weight" else first(load_file(file), "norm.weight")
    change_tensors(file, lambda tensors: tensors.pop(name))
    with pytest.raises(BitPolicyError, match=f"copy lacks 1 tensors, e.g. {name}; download or export it again"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("name", ["conv_in.weight", "extra", "a.b.weight_scale"])
def test_an_unexpected_tensor_is_named(whole: tuple[Path, Path, Any], name: str) -> None:
    folder, file, kind = whole
    change_tensors(file, lambda tensors: tensors.update({name: torch.ones(2)}))
    with pytest.raises(BitPolicyError, match=f"has 1 tensors .*e.g. {name}"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (".weight_packed", torch.int32),
        (".weight_packed", torch.float16),
        (".weight_scale", torch.float64),
        (".weight_scale", torch.bfloat16),
        (".weight_zero", torch.int8),
        (".bias", torch.bfloat16),
        (".bias", torch.int16),
    ],
    ids=str,
)
def test_another_dtype_is_named(whole: tuple[Path, Path, Any], suffix: str, dtype: torch.dtype) -> None:
    folder, file, kind = whole
    name = first(load_file(file), suffix)
    change_tensors(file, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(BitPolicyError, match=rf"{file}: {name} has dtype {dtype}, .*config says .*is damaged"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("suffix", [".weight_packed", ".weight_scale", ".bias"])
def test_another_shape_is_named(whole: tuple[Path, Path, Any], suffix: str) -> None:
    folder, file, kind = whole
    name = first(load_file(file), suffix)
    change_tensors(file, lambda tensors: tensors.update({name: tensors[name][:1].clone()}))
    with pytest.raises(BitPolicyError, match=rf"{file}: {name} has shape \(1,.*config says .*is damaged"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("suffix", [".weight_packed", ".weight_scale", ".weight_zero", ".bias", "norm.weight"])
def test_one_wrong_bit_is_found_and_named(whole: tuple[Path, Path, Any], suffix: str) -> None:
    folder, file, kind = whole
    name = first(load_file(file), suffix)
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + begin] ^= 1
    file.write_bytes(data)
    with pytest.raises(BitPolicyError, match=f"{file}: {name} has checksum .*written with .*is damaged"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_a_truncated_file_is_named(exported: Any, tmp_path: Path, keep: int) -> None:
    folder = shutil.copytree(exported.folder, tmp_path / "copy")
    file = folder / "unet" / UNET
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BitPolicyError, match=f"{file}"):
        load_pipeline(folder)


def test_a_truncated_text_encoder_is_named(text_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(text_encoder, tmp_path / "copy")
    (folder / TEXT).write_bytes((folder / TEXT).read_bytes()[:-1])
    with pytest.raises(BitPolicyError, match=rf"cannot read {folder / TEXT}: .*; download or export it again"):
        CLIPTextModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        (
            {"format_version": 2, "written_by": "0.9.1"},
            r"format_version 2, .* reads 1; install bitpolicy 0\.9\.1",
        ),
        (
            {"format_version": 7, "tensors": []},
            r"format_version 7, .* reads 1; install a newer bitpolicy",
        ),
        ({"tensors": []}, r"unknown entry 'tensors'"),
        ({"storage_dtype": "int8"}, r"storage_dtype is 'int8', needed one of"),
        ({"storage_dtype": "bfloat16"}, r"has dtype torch\.float16, .*config says torch\.bfloat16 or torch\.float32"),
        ({"layers": ["conv_in"]}, r"layers is list, needed a mapping"),
        ({"layers": {"conv_in": 4}}, r"layers: conv_in is 4, needed text"),
        ({"formats": {"int4": 4}}, r"int4 is int, needed a mapping"),
        ({"layers": {"../../conv_in": "int4"}}, r"packs '\.\./\.\./conv_in', which is not a layer"),
        ({"layers": {"/etc/passwd": "int4"}}, r"packs '/etc/passwd', which is not a layer"),
        ({"layers": {"no.such": "int4"}}, r"packs layer 'no\.such', which .* does not have"),
        ({"checksums": "00"}, r"the config has 0 checksums for"),
        ({"checksums": {}}, r"checksums is \{\}, needed text"),
        ({"formats": {}}, r"was written as \{\}; here it is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_an_invalid_config_is_refused(whole: tuple[Path, Path, Any], entries: dict[str, Any], complaint: str) -> None:
    folder, _, kind = whole
    change_config(folder, **entries)
    with pytest.raises(BitPolicyError, match=complaint):
        kind.from_pretrained(folder)


def test_shards_outside_the_folder_are_not_read(exported: Any, tmp_path: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(exported.folder / "unet")
    model.save_pretrained(tmp_path / "copy", max_shard_size="20KB")
    index = tmp_path / "copy" / f"{UNET}.index.json"
    content = json.loads(index.read_text())
    moved = content["weight_map"]["conv_in.bias"]
    (tmp_path / "copy" / moved).rename(tmp_path / moved)
    content["weight_map"] = {n: f"../{f}" if f == moved else f for n, f in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"not allowed|is not read"):  # newer diffusers refuse it before we do
        UNet2DConditionModel.from_pretrained(tmp_path / "copy")
    with pytest.raises(BitPolicyError, match=r"is not read: .*safetensors files in one folder"):
        stored_tensors([tmp_path / "copy" / ".." / moved])


def test_a_file_whose_name_diffusers_does_not_pass_on_is_refused(exported: Any) -> None:
    """from_single_file does not tell a quantizer its files, so they cannot be checked."""
    file = exported.folder / "vae" / "diffusion_pytorch_model.safetensors"
    about = {"config": str(exported.folder), "subfolder": "vae", "quantization_config": BitPolicyConfig()}
    with pytest.raises(BitPolicyError, match="load the folder with from_pretrained"):
        AutoencoderKL.from_single_file(str(file), **about)


class _Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("inside", ["tensors", "code"])
def test_a_pickle_is_not_loaded(whole: tuple[Path, Path, Any], tmp_path: Path, inside: str) -> None:
    folder, file, kind = whole
    name = "pytorch_model.bin" if file.name == TEXT else "diffusion_pytorch_model.bin"
    if inside == "tensors":
        torch.save(load_file(file), folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(_Runs(tmp_path / "ran")))
    file.unlink()
    with pytest.raises((BitPolicyError, OSError, pickle.UnpicklingError)):  # the libraries' own refusals, too
        kind.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", ["low_cpu_mem_usage", "offload_state_dict", "disk"])
def test_loading_options_that_would_cast_packed_tensors_are_refused(exported: Any, tmp_path: Path, kept: str) -> None:
    options: dict[str, Any] = {
        "low_cpu_mem_usage": {"low_cpu_mem_usage": False},
        "offload_state_dict": {"offload_state_dict": True, "dtype": torch.bfloat16},
        "disk": {"device_map": {"": "cpu", "conv_in": "disk"}, "offload_folder": tmp_path},
    }[kept]
    told = r"low_cpu_mem_usage. cannot be False|offload_state_dict|offloaded to disk|unsupported ScalarType"
    with pytest.raises((ValueError, TypeError), match=told):  # an older accelerate has no float8 to offload
        UNet2DConditionModel.from_pretrained(exported.folder / "unet", **options)


def test_packed_models_are_not_saved_as_pickles(exported: Any, tmp_path: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(exported.folder / "unet")
    with pytest.raises(BitPolicyError, match="saved as safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)


def test_a_config_of_another_method_is_refused() -> None:
    with pytest.raises(BitPolicyError, match="quant_method is 'gptq'"):
        BitPolicyConfig(quant_method="gptq")
