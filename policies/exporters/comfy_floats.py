"""ComfyUI's layouts of the formats that NVIDIA's tensor cores multiply.

    float8_e4m3fn   `fp8-tensor`: codes, and one float32 scale
    mxfp8           `mxfp8`: codes, and the powers of two in tiles
    nvfp4           `nvfp4`: two codes in a byte, the first in the high half; e4m3 scales in tiles; one float32 scale

as comfy-kitchen's tensor/fp8.py, mxfp8.py and nvfp4.py read them. Block scales lie in tiles of 128 rows and 4 blocks
(cuBLAS documentation, "1D block scaling factors layout"). Layers whose shape ComfyUI would have to pad are not held.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from bitpolicy.kernels.formats.format import Format, TensorSpec
from bitpolicy.kernels.formats.named import FP8_TENSOR, MXFP8, NVFP4
from bitpolicy.policies.exporters.exporter import Layer

_MULTIPLE: dict[Format, int] = {FP8_TENSOR: 1, MXFP8: 32, NVFP4: 16}
_NAMES: dict[Format, str] = {FP8_TENSOR: "float8_e4m3fn", MXFP8: "mxfp8", NVFP4: "nvfp4"}


def holds_float(layer: Layer) -> bool:
    """Whether ComfyUI has this layer's format, and its shape without padding."""
    multiple = _MULTIPLE.get(layer.format)
    return multiple is not None and all(size % multiple == 0 for size in layer.shape)


def float_name(layer: Layer) -> str:
    """The format's name in ComfyUI."""
    return _NAMES[layer.format]


def float_specs(layer: Layer) -> dict[str, TensorSpec]:
    """The tensors of a layer whose format `holds_float`."""
    out, columns = layer.shape
    if layer.format == FP8_TENSOR:
        codes = TensorSpec(torch.float8_e4m3fn, (out, columns))
        return {"weight": codes, "weight_scale": TensorSpec(torch.float32, ())}
    tiles = (-(-out // 128) * 128, -(-columns // _MULTIPLE[layer.format] // 4) * 4)
    if layer.format == MXFP8:
        codes = TensorSpec(torch.float8_e4m3fn, (out, columns))
        return {"weight": codes, "weight_scale": TensorSpec(torch.uint8, tiles)}
    return {
        "weight": TensorSpec(torch.uint8, (out, columns // 2)),
        "weight_scale": TensorSpec(torch.float8_e4m3fn, tiles),
        "weight_scale_2": TensorSpec(torch.float32, ()),
    }


def converted_float(layer: Layer, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those tensors, made from bitpolicy's own."""
    codes, scale = tensors["weight_packed"], tensors["weight_scale"]
    if layer.format == FP8_TENSOR:
        return {"weight": codes, "weight_scale": scale}
    tiled = _tiled(scale.view(torch.uint8))
    if layer.format == MXFP8:
        return {"weight": codes, "weight_scale": tiled}
    turned = codes << 4 | codes >> 4
    shared = {"weight_scale_2": tensors["weight_scale_2"]}
    return {"weight": turned, "weight_scale": tiled.view(torch.float8_e4m3fn), **shared}


def _tiled(scales: torch.Tensor) -> torch.Tensor:
    """Block scales in the order of tensor cores, padded with zeros.

    In each tile of 128 rows and 4 blocks, the rows n, n + 32, n + 64 and n + 96 are next to each other.

    Args:
        scales: u8, shape (rows, blocks).
    """
    padded = pad(scales, (0, -scales.shape[1] % 4, 0, -scales.shape[0] % 128))
    tiles = padded.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32))
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape)
