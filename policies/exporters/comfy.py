"""ComfyUI: one safetensors file whose quantized linear layers carry `<layer>.comfy_quant` markers.

    int8_tensorwise   W = scale[out] code, optionally rotated (`convrot`)
    convrot_w4a4      the same with 4-bit codes, always rotated
    awq_w4a16         W = (code - 8) scale + zero of each group of inputs, code in [0, 15]
    float8_e4m3fn, mxfp8, nvfp4    as in `bitpolicy.policies.exporters.comfy_floats`

as ComfyUI's comfy/ops.py (`_load_quantized_module`) and comfy-kitchen's tensor classes read them. Only linear layers
can be quantized there; convolutions stay in FP16. The markers say `full_precision_matrix_mult`: ComfyUI then
dequantizes and multiplies in its compute dtype, which is what a policy was searched for. The target `comfy-int8` omits
that entry. ComfyUI then quantizes the inputs of int8 and rotated layers to 8 bits, too, and those of layers in small
floats to the same floats, which is faster and adds an error of its own.

ComfyUI reads models in the layout of their original checkpoints (`bitpolicy.policies.exporters.original`). It also
knows some of diffusers' names, but then it drops every tensor that is not a weight or a bias, including the markers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bitpolicy.kernels.formats.affine import Affine
from bitpolicy.kernels.formats.convrot import ConvRot
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.formats.int8 import Int8
from bitpolicy.kernels.formats.packing import pack_bits, row_length, unpack_bits
from bitpolicy.kernels.formats.tensor_scaled import NvFloat4, TensorScaled
from bitpolicy.policies.exporters.comfy_floats import converted_float, float_name, float_specs, holds_float
from bitpolicy.policies.exporters.exporter import Layer, Source, without_rotation
from bitpolicy.policies.exporters.original.families import is_measured, layout_of
from bitpolicy.policies.exporters.original.rearranged import in_original_layout
from bitpolicy.policies.exporters.translation import write_translated
from bitpolicy.policies.storage.safetensors_writer import SafetensorsWriter

MARKER = "comfy_quant"


@dataclass(frozen=True)
class Comfy:
    """ComfyUI's mixed-precision checkpoints.

    Attributes:
        quantize_inputs: let ComfyUI multiply int8 and rotated layers in INT8.
    """

    name: str = "comfy"
    quantize_inputs: bool = False
    title = "ComfyUI"
    rounds_itself = False
    suggested = ("int4-convrot", "int4", "int8-convrot", "int8", "fp16")

    def holds(self, layer: Layer) -> bool:
        if not layer.format.packed:
            return True
        known = layer.kind == "Linear" and (_is_awq(layer) or _is_row_scaled(layer) or holds_float(layer))
        one_scale = isinstance(layer.format, TensorScaled)  # layers that are merged would need the same one
        return known and not (layer.merged and one_scale) and not (_is_halved(layer) and is_measured(layer.name))

    def tied(self, config: Mapping[str, Any], layers: Iterable[str]) -> list[list[str]]:
        return layout_of(config).tied(layers)

    def write(self, source: Source, folder: Path) -> int:
        source = in_original_layout(source)
        markers = {name: self.marker(layer) for name, layer in source.packed.items()}
        listing = {"format_version": "1.0", "layers": dict(sorted(markers.items()))}
        metadata = {"_quantization_metadata": json.dumps(listing, separators=(",", ":"))}
        metadata |= {"bitpolicy": json.dumps(dict(source.origin), sort_keys=True)}
        writer = partial(SafetensorsWriter, metadata=metadata)
        return write_translated(source, folder / f"{source.component}.safetensors", self, writer)

    def marker(self, layer: Layer) -> dict[str, Any]:
        """The content of a layer's marker, which tells ComfyUI how to read it."""
        if _is_awq(layer):
            return {"format": "awq_w4a16", "group_size": layer.run}
        whole: dict[str, Any] = {} if self.quantize_inputs else {"full_precision_matrix_mult": True}
        format = layer.format
        if holds_float(layer):
            return {"format": float_name(layer), **whole}
        if not isinstance(format, ConvRot):
            return {"format": "int8_tensorwise", **whole}
        if format.bits == 8:
            return {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": format.size, **whole}
        return {"format": "convrot_w4a4", "convrot_groupsize": format.size, "linear_dtype": "int8", **whole}

    def specs(self, layer: Layer, storage: torch.dtype) -> dict[str, TensorSpec]:
        out, columns = layer.shape
        marker = {MARKER: TensorSpec(torch.uint8, (len(self._text(layer)),))}
        if holds_float(layer):
            return {**float_specs(layer), **marker}
        if _is_awq(layer):
            groups = TensorSpec(storage, (columns // layer.run, out))
            nibbles = TensorSpec(torch.int8, (out, columns // 2))
            return {"weight": nibbles, "weight_scale": groups, "weight_zeros": groups, **marker}
        halved = _is_halved(layer)
        codes = TensorSpec(torch.int8, (out, columns // 2 if halved else columns))
        scale = (out,) if halved else (out, 1)
        return {"weight": codes, "weight_scale": TensorSpec(torch.float32, scale), **marker}

    def convert(
        self, layer: Layer, tensors: Mapping[str, torch.Tensor], storage: torch.dtype
    ) -> dict[str, torch.Tensor]:
        if holds_float(layer):
            made = converted_float(layer, tensors)
        else:
            made = _awq(layer, tensors, storage) if _is_awq(layer) else _row_scaled(layer, tensors)
        return {**made, MARKER: torch.frombuffer(bytearray(self._text(layer)), dtype=torch.uint8)}

    def _text(self, layer: Layer) -> bytes:
        return json.dumps(self.marker(layer)).encode()


def _is_awq(layer: Layer) -> bool:
    """Whether its codes have at most 4 bits and fill whole groups."""
    columns, format = layer.shape[1], layer.format
    narrow = isinstance(format, Affine) and format.bits <= 4 and without_rotation(format)
    return narrow and columns % 2 == 0 and columns % layer.run == 0


def _is_halved(layer: Layer) -> bool:
    """Whether two codes share a byte."""
    rotated = isinstance(layer.format, ConvRot) and layer.format.bits == 4
    return _is_awq(layer) or rotated or isinstance(layer.format, NvFloat4)


def _is_row_scaled(layer: Layer) -> bool:
    """Whether it has one scale per row and no zero point."""
    format = layer.format
    if isinstance(format, Affine):
        return without_rotation(format) and format.symmetric and format.group is None
    return isinstance(format, Int8 | ConvRot)


def _awq(layer: Layer, tensors: Mapping[str, torch.Tensor], storage: torch.dtype) -> dict[str, torch.Tensor]:
    """scale (code - zero) = (code - 8) scale + (8 - zero) scale.

    Codes of 2 and 3 bits are shifted so that their zero point is 8. Then there is nothing to add, and nothing is
    rounded.
    """
    format = layer.format
    assert isinstance(format, Affine)
    codes, grid = format.load(tensors, layer.shape)
    zero = torch.full_like(grid.scale, 2 ** (format.bits - 1)) if grid.zero is None else grid.zero
    if format.bits < 4:
        codes = (codes.unflatten(1, (-1, layer.run)) + (8 - zero)[..., None]).flatten(1)
        zero = torch.full_like(zero, 8)
    return {
        "weight": pack_bits(codes.to(torch.uint8), 4).view(torch.int8),
        "weight_scale": grid.scale.to(storage).mT.contiguous(),
        "weight_zeros": ((8 - zero) * grid.scale).to(storage).mT.contiguous(),
    }


def _row_scaled(layer: Layer, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    format, scale = layer.format, tensors["weight_scale"].float()
    if isinstance(format, ConvRot):
        codes = format.codes(tensors, layer.shape)
        if format.bits == 4:  # two's complement, the even column in the low nibble
            return {"weight": pack_bits(codes.view(torch.uint8) & 15, 4).view(torch.int8), "weight_scale": scale}
        return {"weight": codes, "weight_scale": scale[:, None]}
    if isinstance(format, Affine):
        raised = unpack_bits(tensors["weight_packed"], format.bits, row_length(layer.shape)).to(torch.int16)
        return {"weight": (raised - 2 ** (format.bits - 1)).to(torch.int8), "weight_scale": scale}
    return {"weight": tensors["weight_packed"], "weight_scale": scale[:, None]}
