"""SDNQ: a denoiser's folder that `from_pretrained` loads with the sdnq package, including convolutions.

    int2 ... int8     W = scale code,           code in [-2^(b-1), 2^(b-1) - 1]
    uint2 ... uint8   W = scale code + offset,  code in [0, 2^b - 1]
    float8_e4m3fn     W = scale value

with a scale, and an offset, for each run of input channels at each position of a kernel, all float32
(sdnq/quantizer.py, `sdnq_quantize_layer_weight`; sdnq/dequantizer.py). The groups of a policy run along (kh, kw, in).
Where a group continues past the last channel, SDNQ's runs are the shorter pieces, each with its group's scale: the
same weight, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from bitpolicy.kernels.formats.affine import Affine
from bitpolicy.kernels.formats.float_codes import Float8
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.formats.int8 import Int8
from bitpolicy.kernels.formats.packing import from_rows, row_length, unpack_bits
from bitpolicy.policies.exporters.exporter import Layer, Source, without_rotation
from bitpolicy.policies.exporters.sdnq_packing import codes_per_block, pack_blocks, packed_shape
from bitpolicy.policies.exporters.translation import write_translated

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Sdnq:
    """SD.Next's quantization, read by diffusers with `pip install sdnq`."""

    name: str = "sdnq"
    title = "SDNQ"
    rounds_itself = False
    suggested = ("int4", "int5", "int6", "int8", "fp16")

    def holds(self, layer: Layer) -> bool:
        format = layer.format
        if not format.packed:
            return True
        known = isinstance(format, Int8 | Float8) or without_rotation(format)
        whole = prod(layer.shape) % codes_per_block(_bits(layer)) == 0
        return known and whole

    def tied(self, config: Mapping[str, Any], layers: Iterable[str]) -> list[list[str]]:
        return []

    def write(self, source: Source, folder: Path) -> int:
        place = folder / source.component
        place.mkdir()
        config = {**source.config, "quantization_config": self.config(source)}
        (place / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return write_translated(source, place / WEIGHTS, self)

    def config(self, source: Source) -> dict[str, Any]:
        """SDNQ's own settings, with every layer by name."""
        packed = sorted(source.packed.items())
        dtypes: dict[str, list[str]] = {}
        for name, layer in packed:
            dtypes.setdefault(_dtype(layer), []).append(f"{name}.weight")
        groups = {f"{name}.weight": {"group_size": self.group(layer)} for name, layer in packed}
        return {
            "quant_method": "sdnq",
            "weights_dtype": "int8",
            "group_size": -1,
            "quant_conv": True,
            "dequantize_fp32": True,
            "use_quantized_matmul": False,
            "use_quantized_matmul_conv": False,
            "add_skip_keys": False,
            "modules_to_not_convert": [f"{name}.weight" for name in sorted(_unpacked(source))],
            "modules_dtype_dict": dict(sorted(dtypes.items())),
            "modules_quant_config": groups,
        }

    def group(self, layer: Layer) -> int:
        """The number of input channels that share a scale; -1 for all."""
        return layer.even_run if layer.even_run < layer.shape[1] else -1

    def specs(self, layer: Layer, storage: torch.dtype) -> dict[str, TensorSpec]:
        bits, codes = _bits(layer), self._codes_shape(layer)
        grouped = TensorSpec(torch.float32, self._scale_shape(layer))
        plain = {8: torch.uint8 if _dtype(layer).startswith("u") else torch.int8}
        dtype = torch.float8_e4m3fn if isinstance(layer.format, Float8) else plain.get(bits, torch.uint8)
        shape = codes if bits == 8 else packed_shape(prod(codes), bits)
        specs = {"weight": TensorSpec(dtype, shape), "scale": grouped}
        return {**specs, "zero_point": grouped} if _is_unsigned(layer) else specs

    def convert(
        self, layer: Layer, tensors: Mapping[str, torch.Tensor], storage: torch.dtype
    ) -> dict[str, torch.Tensor]:
        scale = self._spread(layer, tensors["weight_scale"].float())
        if not isinstance(layer.format, Affine):
            return {"weight": tensors["weight_packed"].reshape(self._codes_shape(layer)), "scale": scale}
        bits = layer.format.bits
        raised = from_rows(unpack_bits(tensors["weight_packed"], bits, row_length(layer.shape)), layer.shape)
        codes = raised.reshape(self._codes_shape(layer))
        if bits == 8 and layer.format.symmetric:
            codes = (codes.to(torch.int16) - 128).to(torch.int8)
        made = {"weight": codes if bits == 8 else pack_blocks(codes, bits), "scale": scale}
        if layer.format.symmetric:
            return made
        offset = -tensors["weight_zero"].float() * tensors["weight_scale"].float()
        return {**made, "zero_point": self._spread(layer, offset)}

    def _codes_shape(self, layer: Layer) -> tuple[int, ...]:
        out, channels, *kernel = layer.shape
        group = self.group(layer)
        return (out, channels, *kernel) if group < 0 else (out, channels // group, group, *kernel)

    def _scale_shape(self, layer: Layer) -> tuple[int, ...]:
        out, channels, *kernel = layer.shape
        group = self.group(layer)
        return (out, 1, *kernel) if group < 0 else (out, channels // group, 1, *kernel)

    def _spread(self, layer: Layer, values: torch.Tensor) -> torch.Tensor:
        """One value per group (out, groups), or per channel (out,) -> one per run of SDNQ."""
        out, channels, *kernel = layer.shape
        run = layer.even_run
        starts = torch.arange(0, row_length(layer.shape), run)
        picked = values.reshape(out, -1)[:, starts // layer.run]
        return from_rows(picked, (out, channels // run, *kernel)).reshape(self._scale_shape(layer))


def _bits(layer: Layer) -> int:
    return int(layer.format.parameters()["bits"])


def _is_unsigned(layer: Layer) -> bool:
    return isinstance(layer.format, Affine) and not layer.format.symmetric


def _dtype(layer: Layer) -> str:
    """SDNQ's name for the dtype of the codes."""
    if isinstance(layer.format, Float8):
        return "float8_e4m3fn"
    return f"{'u' if _is_unsigned(layer) else ''}int{_bits(layer)}"


def _unpacked(source: Source) -> list[str]:
    return [name for name, layer in source.layers.items() if not layer.format.packed]
