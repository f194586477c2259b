"""The names that ComfyUI needs for tensors.

ComfyUI reads U-Nets under the names of the original latent diffusion code. It also knows diffusers' names, but then it
drops every tensor that is not a weight or a bias, including the markers of quantization. The original code numbers the
blocks across all levels: with L layers per level, `down_blocks.1.resnets.0` is `input_blocks.(1 + L + 1).0`
(comfy/utils.py, `unet_to_diffusers`; diffusers/loaders/single_file_utils.py, `convert_ldm_unet_checkpoint`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.exporters.exporter import Source
from bitpolicy.policies.exporters.translation import as_it_is

SAME_NAMES = ("QwenImageTransformer2DModel",)
"""Classes whose tensors have the same names in ComfyUI."""

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


def comfy_namer(source: Source) -> Callable[[str], str]:
    """The function that renames a tensor of this model for ComfyUI.

    Raises:
        BitPolicyError: bitpolicy does not know ComfyUI's names for this class.
    """
    if source.class_name in SAME_NAMES:
        return as_it_is
    if source.class_name != "UNet2DConditionModel":
        raise BitPolicyError(
            f"ComfyUI has other names, and often merged layers, for {source.class_name}, which bitpolicy does not know "
            f"(it knows UNet2DConditionModel, {', '.join(SAME_NAMES)}); export it with --target sdnq or without "
            "--target"
        )
    return _UNet(source).rename


class _UNet:
    """The names for one U-Net, which depend on the number of layers in each level."""

    def __init__(self, source: Source) -> None:
        levels = len(source.config["block_out_channels"])
        given = source.config["layers_per_block"]
        layers = [given] * levels if isinstance(given, int) else list(given)
        self._down = list(accumulate((n + 1 for n in layers), initial=1))
        self._up = list(accumulate((n + 1 for n in reversed(layers)), initial=0))
        found = [match for name in source.layers if (match := _BLOCK.match(name))]
        self._attending = {match[2] for match in found if (match[1], match[3]) == ("up", "attentions")}

    def rename(self, name: str) -> str:
        """A tensor's name in ComfyUI, given its name in diffusers."""
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
    """The part of a name within a block: residual blocks have other names in ComfyUI, attention the same."""
    module, _, leaf = rest.partition(".")
    return f"{_IN_RESNET[module]}.{leaf}" if kind == "resnets" else rest
