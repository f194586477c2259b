"""GGUF: one file with a type for each tensor, read by ComfyUI-GGUF, stable-diffusion.cpp and diffusers.

    Q4_0, Q5_0, Q8_0    w = d (q - 8), d (q - 16), d q       of 32 weights along a row, d in float16
    Q4_1, Q5_1          w = d q + m                          the same, m in float16
    F16, BF16, F32      everything else

as ggml defines its blocks (ggml-common.h; the Python package `gguf`, quants.py). A format with one scale for 64, 128 or
all weights of a row is held with the scale repeated; codes of fewer bits are held in the next wider type. Then the file
is larger than the policy says: `int4-g32-sym`, `int5-g32-sym` and `int8-g32` are stored as they are. m = -zero d and
the float32 scales of `int8` are rounded to float16, everything else is exact.

Names are those of the original checkpoint. Convolutions stay unquantized, because the readers differ in how they take
them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.affine import Affine
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.formats.int8 import Int8
from bitpolicy.policies.exporters.exporter import Layer, Source, without_rotation
from bitpolicy.policies.exporters.original.families import layout_of
from bitpolicy.policies.exporters.original.rearranged import in_original_layout
from bitpolicy.policies.exporters.translation import write_translated
from bitpolicy.policies.storage.gguf_writer import GgufWriter

BLOCK: Final = 32
_BYTES: Final = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}  # of a block
ARCHITECTURES: Final[Mapping[str, str]] = {
    "AuraFlowTransformer2DModel": "aura",
    "ChromaTransformer2DModel": "flux",
    "CosmosTransformer3DModel": "cosmos",
    "Flux2Transformer2DModel": "flux",
    "FluxTransformer2DModel": "flux",
    "HiDreamImageTransformer2DModel": "hidream",
    "HunyuanVideoTransformer3DModel": "hyvid",
    "LTXVideoTransformer3DModel": "ltxv",
    "Lumina2Transformer2DModel": "lumina2",
    "QwenImageTransformer2DModel": "qwen_image",
    "SD3Transformer2DModel": "sd3",
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan",
    "ZImageTransformer2DModel": "lumina2",
}
"""`general.architecture`, as ComfyUI-GGUF knows it (loader.py, IMG_ARCH_LIST). It refuses files with another one."""


@dataclass(frozen=True)
class Gguf:
    """GGUF files."""

    name: str = "gguf"
    title = "GGUF"
    rounds_itself = False
    suggested = ("int4-g32-sym", "int4-g32", "int5-g32-sym", "int8-g32", "fp16")

    def holds(self, layer: Layer) -> bool:
        if not layer.format.packed:
            return True
        return layer.kind == "Linear" and layer.shape[1] % BLOCK == 0 and block_type(layer) is not None

    def tied(self, config: Mapping[str, Any], layers: Iterable[str]) -> list[list[str]]:
        return layout_of(config).tied(layers)

    def write(self, source: Source, folder: Path) -> int:
        _require_package()
        architecture = architecture_of(source)
        source = in_original_layout(source)
        types = {f"{name}.weight": str(block_type(layer)) for name, layer in source.packed.items()}
        origin = json.dumps(dict(source.origin), sort_keys=True)

        def writer(path: Path, specs: Mapping[str, TensorSpec]) -> GgufWriter:
            return GgufWriter(path, specs, types, architecture, {"bitpolicy": origin})

        return write_translated(source, folder / f"{source.component}.gguf", self, writer)

    def specs(self, layer: Layer, storage: torch.dtype) -> dict[str, TensorSpec]:
        out, columns = layer.shape
        return {"weight": TensorSpec(torch.uint8, (out, columns // BLOCK * _BYTES[str(block_type(layer))]))}

    def convert(
        self, layer: Layer, tensors: Mapping[str, torch.Tensor], storage: torch.dtype
    ) -> dict[str, torch.Tensor]:
        codes, scale, zero = _blocks(layer, tensors)
        kind = str(block_type(layer))
        if float((scale * zero.clamp(min=1)).abs().max()) > torch.finfo(torch.float16).max:
            raise BitPolicyError(f"the scales of {layer.name} are beyond float16, which GGUF has; keep that layer fp16")
        signed = codes - zero[..., None]
        if kind == "Q8_0":
            return _row_of_blocks(_bytes(scale), signed.to(torch.int8).view(torch.uint8))
        minimum = [_bytes(-zero * scale)] if kind.endswith("_1") else []
        whole = (codes if minimum else signed + 2 ** (int(kind[1]) - 1)).to(torch.uint8)
        fifth = [_bits(whole >> 4)] if kind.startswith("Q5") else []
        low, high = (whole & 15).unflatten(-1, (2, BLOCK // 2)).unbind(-2)
        return _row_of_blocks(_bytes(scale), *minimum, *fifth, low | high << 4)


def block_type(layer: Layer) -> str | None:
    """The type whose blocks hold a linear layer's codes and scales; None if there is none."""
    format = layer.format
    if isinstance(format, Int8):
        return "Q8_0"
    if not isinstance(format, Affine) or not without_rotation(format) or layer.run % BLOCK:
        return None
    if format.bits > 5:
        return "Q8_0" if format.symmetric else None
    return f"Q{max(format.bits, 4)}_{'0' if format.symmetric else '1'}"


def architecture_of(source: Source) -> str:
    """`general.architecture` of a component.

    Raises:
        BitPolicyError: the readers know no name for this class.
    """
    if source.class_name == "UNet2DConditionModel":
        return "sdxl" if source.config.get("addition_embed_type") == "text_time" else "sd1"
    try:
        return ARCHITECTURES[source.class_name]
    except KeyError:
        raise BitPolicyError(
            f"GGUF has no architecture for {source.class_name}; it has one for {', '.join(sorted(ARCHITECTURES))} and "
            "UNet2DConditionModel"
        ) from None


def _blocks(layer: Layer, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w = (code - zero) scale: codes, int16, (out, blocks, 32); scales and zero points, float32, (out, blocks)."""
    format, (out, columns) = layer.format, layer.shape
    if isinstance(format, Int8):
        codes, scale, zero = tensors["weight_packed"], tensors["weight_scale"].float()[:, None], torch.zeros(out, 1)
    else:
        assert isinstance(format, Affine)
        codes, grid = format.load(tensors, layer.shape)
        scale = grid.scale.float()
        zero = torch.full_like(scale, 2 ** (format.bits - 1)) if grid.zero is None else grid.zero.float()
    repeated = columns // BLOCK // scale.shape[1]
    scale, zero = (value.repeat_interleave(repeated, 1) for value in (scale, zero))
    return codes.to(torch.int16).unflatten(1, (-1, BLOCK)), scale, zero


def _row_of_blocks(*parts: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weight, from the parts of every block."""
    return {"weight": torch.cat(parts, -1).flatten(1)}


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """As float16, shape (..., 2), uint8."""
    return values.half()[..., None].contiguous().view(torch.uint8)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Thirty-two bits as four bytes, the first bit lowest."""
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    return (values.unflatten(-1, (4, 8)) * weights).sum(-1, dtype=torch.int32).to(torch.uint8)


def _require_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise BitPolicyError("writing GGUF needs the package gguf; pip install 'bitpolicy[gguf]'")
