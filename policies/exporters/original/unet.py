"""The original layout of U-Nets: the names of the latent diffusion code.

It numbers the blocks across all levels: with L layers per level, `down_blocks.1.resnets.0` is
`input_blocks.(1 + L + 1).0` (comfy/utils.py, `unet_to_diffusers`; diffusers/loaders/single_file_utils.py,
`convert_ldm_unet_checkpoint`). Nothing is merged or swapped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.exporters.original.layout import Place

_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


class UNet:
    """The layout of one U-Net, which depends on the number of layers in each level.

    Args:
        config: of diffusers' model.
    """

    measured = (
        "add_embedding.linear_1",
        "class_embedding.linear_1",
        "down_blocks.*.attentions.0.transformer_blocks.0.attn2.to_k",
    )
    marks: Mapping[str, str] = {}

    def __init__(self, config: Mapping[str, Any]) -> None:
        levels = len(config["block_out_channels"])
        given = config["layers_per_block"]
        layers = [given] * levels if isinstance(given, int) else list(given)
        self._down = list(accumulate((n + 1 for n in layers), initial=1))
        self._up = list(accumulate((n + 1 for n in reversed(layers)), initial=0))
        self._attending: set[str] = set()

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """The place of every tensor of the model, by name in diffusers.

        Raises:
            BitPolicyError: the original code has no place for a tensor.
        """
        names = list(names)
        found = [match for name in names if (match := _BLOCK.match(name))]
        self._attending = {match[2] for match in found if (match[1], match[3]) == ("up", "attentions")}
        return {name: Place(self._name(name), (name,)) for name in names}

    def tied(self, layers: Iterable[str]) -> list[list[str]]:
        """No layers are merged."""
        return []

    def _name(self, name: str) -> str:
        if found := _BLOCK.fullmatch(name):
            side, block, kind, index, rest = found.groups()
            return self._in_block(side, int(block), kind, int(index), rest)
        if found := _MIDDLE.fullmatch(name):
            kind, index, rest = found.groups()
            place = 1 if kind == "attentions" else 2 * int(index)
            return f"middle_block.{place}.{_within(kind, rest)}"
        module, _, leaf = name.rpartition(".")
        if module not in _TOP:
            raise BitPolicyError(f"ComfyUI's U-Net has no place for {name}; export this model without --target")
        return f"{_TOP[module]}.{leaf}"

    def _in_block(self, side: str, block: int, kind: str, index: int, rest: str) -> str:
        if kind == "downsamplers":
            return f"input_blocks.{self._down[block + 1] - 1}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            last = 2 if str(block) in self._attending else 1
            return f"output_blocks.{self._up[block + 1] - 1}.{last}.{rest}"
        place = (
            f"input_blocks.{self._down[block] + index}"
            if side == "down"
            else f"output_blocks.{self._up[block] + index}"
        )
        return f"{place}.{1 if kind == 'attentions' else 0}.{_within(kind, rest)}"


def _within(kind: str, rest: str) -> str:
    """The part of a name within a block: residual blocks have other names, attention the same."""
    module, _, leaf = rest.partition(".")
    return f"{_IN_RESNET[module]}.{leaf}" if kind == "resnets" else rest
