"""NVIDIA modelopt: a recipe, the `quant_cfg` that `modelopt.torch.quantization.quantize` takes, layer by layer.

It holds no weights: modelopt finds the largest weight of each channel or block itself. Its integers are symmetric,
W = amax / (2^(b-1) - 1) code. At 8 bits per channel this is exactly the grid of `int8`; at fewer bits it has one level
less than ours. Blocks run along the input channels, separately at each position of a kernel. They are our groups if
the group size divides the number of channels.
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
class ModelOpt:
    """NVIDIA's model optimizer."""

    name: str = "modelopt"
    title = "NVIDIA modelopt"
    rounds_itself = True
    suggested = ("int4-sym", "int6-sym", "int8", "fp16")

    def holds(self, layer: Layer) -> bool:
        format = layer.format
        if not format.packed or isinstance(format, Int8 | Float8):
            return True
        if not isinstance(format, Affine) or not without_rotation(format) or not format.symmetric or format.bits < 3:
            return False
        return format.group is None or layer.shape[1] % format.group == 0

    def tied(self, config: Mapping[str, Any], layers: Iterable[str]) -> list[list[str]]:
        return []

    def write(self, source: Source, folder: Path) -> int:
        off = {"quantizer_name": "*", "enable": False}
        entries = [off, *(self.entry(layer) for _, layer in sorted(source.packed.items()))]
        recipe = {"quant_cfg": entries, "algorithm": "max"}
        (folder / f"{source.component}.modelopt.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
        return 0

    def entry(self, layer: Layer) -> dict[str, Any]:
        """modelopt's configuration of one layer's weight quantizer."""
        format = layer.format
        bits: Any = [4, 3] if isinstance(format, Float8) else int(format.parameters()["bits"])
        group = format.group if isinstance(format, Affine) else None
        shared: dict[str, Any] = {"block_sizes": {"1": group, "type": "static"}} if group else {"axis": 0}
        return {"quantizer_name": f"{layer.name}.weight_quantizer", "cfg": {"num_bits": bits, **shared}}
