"""The original layouts that bitpolicy knows, by diffusers' classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.exporters.original import images, videos
from bitpolicy.policies.exporters.original.layout import Family, Place, regex
from bitpolicy.policies.exporters.original.unet import UNet


class Layout(Protocol):
    """The original layout of one model."""

    @property
    def marks(self) -> Mapping[str, str]:
        """Entries of the config -> tensors whose presence means that the entry is set."""

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """The place of every tensor of the model, by name in diffusers.

        Raises:
            BitPolicyError: there is no place for a tensor.
        """

    def tied(self, layers: Iterable[str]) -> list[list[str]]:
        """Groups of layers that are one layer there."""


_FAMILIES: Final[Mapping[str, Family]] = {
    "AuraFlowTransformer2DModel": images.AURA_FLOW,
    "ChromaTransformer2DModel": images.CHROMA,
    "Flux2Transformer2DModel": images.FLUX_2,
    "FluxTransformer2DModel": images.FLUX,
    "HiDreamImageTransformer2DModel": images.HIDREAM,
    "HunyuanImageTransformer2DModel": videos.HUNYUAN_IMAGE,
    "HunyuanVideo15Transformer3DModel": videos.HUNYUAN_VIDEO_15,
    "HunyuanVideoTransformer3DModel": videos.HUNYUAN_VIDEO,
    "LTX2VideoTransformer3DModel": videos.LTX_2,
    "LTXVideoTransformer3DModel": videos.LTX,
    "Lumina2Transformer2DModel": images.LUMINA_2,
    "MochiTransformer3DModel": videos.MOCHI,
    "PixArtTransformer2DModel": images.PIXART,
    "QwenImageTransformer2DModel": images.QWEN_IMAGE,
    "SD3Transformer2DModel": images.SD_3,
    "WanTransformer3DModel": videos.WAN,
    "WanVACETransformer3DModel": videos.WAN,
    "ZImageTransformer2DModel": images.Z_IMAGE,
}
_COSMOS, _UNET = "CosmosTransformer3DModel", "UNet2DConditionModel"
CLASSES: Final = tuple(sorted([*_FAMILIES, _COSMOS, _UNET]))


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The original layout of a model.

    Args:
        config: of diffusers' model, including `_class_name`.

    Raises:
        BitPolicyError: the class is unknown.
    """
    name = config["_class_name"]
    if name == _UNET:
        return UNet(config)
    if name == _COSMOS:  # Predict 1 adds learnable positions
        return videos.COSMOS_1 if config["extra_pos_embed_type"] == "learnable" else videos.COSMOS_2
    if name in _FAMILIES:
        return _FAMILIES[name]
    raise BitPolicyError(
        f"ComfyUI has other names, and often merged layers, for {name}, which bitpolicy does not know (it knows "
        f"{', '.join(CLASSES)}); export it with --target sdnq or without --target"
    )


def is_measured(layer: str) -> bool:
    """Whether the stored width of a layer tells ComfyUI, for some family, which model it is."""
    return any(pattern.match(layer) for pattern in _MEASURED)


_MEASURED: Final[tuple[re.Pattern[str], ...]] = tuple(
    regex(pattern, start=r"^(?:\w+\.)?", end="$")  # the component's name may come first
    for patterns in (*(family.measured for family in _FAMILIES.values()), videos.COSMOS_1.measured, UNet.measured)
    for pattern in patterns
)
