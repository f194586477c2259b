"""The other programs of docs/exporters.md, each reading what its exporter wrote with its own code.

A reader gives the weights that the program multiplies with, and where it has a model of its own, what that predicts.
Programs that are not installed skip their tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Reading:
    """What a program makes of the files.

    Attributes:
        weights: layer name, in diffusers, -> float32 weight, of the layers that are quantized there.
        model: the denoiser as the program runs it, float32.
    """

    weights: Weights
    model: Any


@dataclass(frozen=True)
class Reader:
    """One program.

    Attributes:
        read: of the folder that was written and a fresh denoiser of the original weights.
        exact: how far a weight may be from ours, as a share of the largest; None where the program rounds itself.
        same_grid: formats that such a program has on the very grid of ours.
    """

    read: Callable[[Path, Any], Reading]
    exact: float | None
    same_grid: tuple[str, ...] = ()


def named(unet: Any, names: Mapping[str, torch.Tensor] | Any) -> dict[str, str]:
    """diffusers' name -> the original code's, of all parameters, by diffusers' own conversion."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    marks = {f"model.diffusion_model.{name}": torch.tensor(i) for i, name in enumerate(names)}
    found = convert_ldm_unet_checkpoint(marks, dict(unet.config))
    every = list(names)
    return {name: every[int(mark)] for name, mark in found.items()}


def read_comfy(folder: Path, unet: Any) -> Reading:
    """As comfy/ops.py builds its quantized layers; the multiplication is that of a plain layer."""
    pytest.importorskip("comfy_kitchen", reason="pip install comfy-kitchen")
    with safe_open(folder / "unet.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        listed = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    marked = {n.removesuffix(".comfy_quant"): bytes(t.numpy()) for n, t in stored.items() if n.endswith(".comfy_quant")}
    assert {name: json.loads(text) for name, text in marked.items()} == listed
    ours = named(unet, [name for name in stored if name.endswith((".weight", ".bias"))])
    weights = {}
    for name, parameter in unet.named_parameters():
        layer, _, leaf = ours[name].rpartition(".")
        if leaf == "weight" and layer in listed:
            value = _comfy_weight(layer, listed[layer], stored, tuple(parameter.shape))
            weights[name.removesuffix(".weight")] = value
        else:
            value = stored[ours[name]]
        parameter.data = value.float()
    return Reading(weights, unet)


def _comfy_weight(layer: str, marker: Any, stored: Weights, shape: tuple[int, ...]) -> torch.Tensor:
    from comfy_kitchen import tensor as kitchen

    scale = stored[f"{layer}.weight_scale"]
    if marker["format"] == "nvfp4":
        blocks, scale = scale, stored[f"{layer}.weight_scale_2"]
    elif marker["format"] == "mxfp8":
        scale = scale.view(torch.float8_e8m0fnu)
    common = {"scale": scale, "orig_dtype": torch.float32, "orig_shape": shape}
    rotation = {key: marker[key] for key in ("convrot", "convrot_groupsize") if key in marker}
    if marker["format"] == "int8_tensorwise":
        name, params = "TensorWiseINT8Layout", kitchen.TensorWiseINT8Layout.Params(**common, **rotation)
    elif marker["format"] == "convrot_w4a4":
        more = {"quant_group_size": 64, "linear_dtype": marker.get("linear_dtype", "int4")}
        params = kitchen.TensorCoreConvRotW4A4Layout.Params(**common, **rotation, **more)
        name = "TensorCoreConvRotW4A4Layout"
    elif marker["format"] == "nvfp4":
        name, params = "TensorCoreNVFP4Layout", kitchen.TensorCoreNVFP4Layout.Params(**common, block_scale=blocks)
    elif marker["format"] == "mxfp8":
        name, params = "TensorCoreMXFP8Layout", kitchen.TensorCoreMXFP8Layout.Params(**common)
    elif marker["format"] == "float8_e4m3fn":
        name, params = "TensorCoreFP8Layout", kitchen.TensorCoreFP8Layout.Params(**common)
    else:
        assert marker["format"] == "awq_w4a16"
        zeros = {"zeros": stored[f"{layer}.weight_zeros"], "group_size": marker["group_size"]}
        name, params = "TensorCoreAWQW4A16Layout", kitchen.TensorCoreAWQW4A16Layout.Params(**common, **zeros)
    return kitchen.QuantizedTensor(stored[f"{layer}.weight"], name, params).dequantize()


def read_sdnq(folder: Path, unet: Any) -> Reading:
    """Loaded by diffusers, multiplied by sdnq."""
    os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"
    pytest.importorskip("sdnq", reason="pip install sdnq")
    loaded = type(unet).from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    weights = {}
    for name, layer in loaded.named_modules():
        if hasattr(layer, "sdnq_dequantizer"):
            parts = {"zero_point": layer.zero_point, "dtype": torch.float32, "skip_compile": True}
            weights[name] = layer.sdnq_dequantizer(layer.weight, layer.scale, **parts)
    return Reading(weights, loaded)


def read_torchao(folder: Path, unet: Any) -> Reading:
    """torchao's own quantize_ under the recipe."""
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    from torchao.core.config import config_from_dict

    recipe = config_from_dict(json.loads((folder / "unet.torchao.json").read_text()))
    quantization.quantize_(unet, recipe, filter_fn=None)
    layers = {name: unet.get_submodule(name) for name in recipe.fqn_to_config}
    return Reading({name: layer.weight.dequantize().float() for name, layer in layers.items()}, unet)


def read_modelopt(folder: Path, unet: Any) -> Reading:
    """modelopt's fake-quantized model under the recipe."""
    mtq = pytest.importorskip("modelopt.torch.quantization", reason="pip install nvidia-modelopt")
    recipe = json.loads((folder / "unet.modelopt.json").read_text(), object_hook=_whole_numbers)
    mtq.quantize(unet, recipe, lambda _: None)
    weights = {}
    for name, layer in unet.named_modules():
        quantizer = getattr(layer, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            weights[name] = quantizer(layer.weight).detach()
    return Reading(weights, unet)


def _whole_numbers(entry: dict[str, Any]) -> dict[Any, Any]:
    """JSON has no whole numbers as keys."""
    return {int(key) if key.isdigit() else key: value for key, value in entry.items()}


def read_gguf(folder: Path, unet: Any) -> Reading:
    """As the package gguf dequantizes each type. It has the shape of a tensor in the other order."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "unet.gguf").tensors}
    values = {name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for name, t in found.items()}
    ours, weights = named(unet, list(found)), {}
    for name, parameter in unet.named_parameters():
        parameter.data = values[ours[name]].float().reshape(parameter.shape)
        if found[ours[name]].tensor_type.name.startswith("Q"):
            weights[name.removesuffix(".weight")] = parameter.detach()
    return Reading(weights, unet)


READERS = {
    "comfy": Reader(read_comfy, exact=1e-3),
    "comfy-int8": Reader(read_comfy, exact=1e-3),
    "sdnq": Reader(read_sdnq, exact=0.0),
    "torchao": Reader(read_torchao, None, ("int2-g128", "int3", "int4", "int4-g32", "int5", "int6", "fp8")),
    "gguf": Reader(read_gguf, exact=1e-3),
    "modelopt": Reader(read_modelopt, None, ("int8", "fp8")),
}
