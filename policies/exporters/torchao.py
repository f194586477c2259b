"""torchao: a recipe, `FqnToConfig` in torchao's own serialization, that its `quantize_` applies layer by layer.

It holds no weights: torchao computes scales and codes from the original model itself. Asymmetric integers are on the
same grid as ours (range over 2^b - 1, scale in float16), and so is float8. Symmetric integers are on a grid of
torchao's own that spans [-2^(b-1), 2^(b-1) - 1] without clipping. Groups need a linear layer whose inputs they divide;
convolutions have one scale per output channel (torchao/quantization/quant_api.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitpolicy.kernels.formats.affine import Affine
from bitpolicy.kernels.formats.float_codes import Float8
from bitpolicy.kernels.formats.int8 import Int8
from bitpolicy.policies.exporters.exporter import Layer, Source, without_rotation


@dataclass(frozen=True)
class TorchAo:
    """PyTorch's quantization library."""

    name: str = "torchao"
    title = "torchao"
    rounds_itself = True
    suggested = ("int4", "int8", "fp16")

    def holds(self, layer: Layer) -> bool:
        format = layer.format
        if not format.packed or isinstance(format, Int8):
            return True
        if isinstance(format, Float8):
            return layer.kind == "Linear"
        if not isinstance(format, Affine) or not without_rotation(format):
            return False
        return format.group is None or (layer.kind == "Linear" and layer.shape[1] % format.group == 0)

    def tied(self, config: Mapping[str, Any], layers: Iterable[str]) -> list[list[str]]:
        return []

    def write(self, source: Source, folder: Path) -> int:
        layers = {name: self.config(layer) for name, layer in sorted(source.packed.items())}
        recipe = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": layers}}
        (folder / f"{source.component}.torchao.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
        return 0

    def config(self, layer: Layer) -> dict[str, Any]:
        """torchao's configuration of one layer."""
        format = layer.format
        if isinstance(format, Float8):
            return _of("Float8WeightOnlyConfig", 2, {"weight_dtype": _plain("torch.dtype", "float8_e4m3fn")})
        bits = format.bits if isinstance(format, Affine) else 8
        group = format.group if isinstance(format, Affine) else None
        symmetric = not isinstance(format, Affine) or format.symmetric
        granularity = _of("PerGroup", 1, {"group_size": group}) if group else _of("PerAxis", 1, {"axis": 0})
        settings = {
            "weight_dtype": _plain("torch.dtype", f"int{bits}"),
            "granularity": granularity,
            "mapping_type": _plain("MappingType", "SYMMETRIC_NO_CLIPPING_ERR" if symmetric else "ASYMMETRIC"),
            "scale_dtype": _plain("torch.dtype", "float16" if isinstance(format, Affine) else "float32"),
        }
        return _of("IntxWeightOnlyConfig", 2, settings)


def _of(kind: str, version: int, data: dict[str, Any]) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


def _plain(kind: str, value: str) -> dict[str, str]:
    return {"_type": kind, "_data": value}
