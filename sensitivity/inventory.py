"""The layers of a denoiser, with what each does (role) and where it sits (stage).

Roles come from structure and module types first, and from names last; a layer no rule knows is `other`, never skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.layers import PackedLayer, Quantizable, quantizable_layers


@dataclass(frozen=True)
class Layer:
    """One quantizable layer.

    Attributes:
        name: its module path in the denoiser.
        kind: its torch class, e.g. "Conv2d".
        shape: of its weight, (out, in/groups, *kernel).
        has_bias: whether bias correction has something to correct.
        role: what it does, e.g. "attention_qkv".
        stage: "encoder", "middle" or "decoder" in a U-Net; "early", "middle" or "late" by depth in a transformer;
            "ends" outside the blocks.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    has_bias: bool
    role: str
    stage: str

    @property
    def group(self) -> str:
        """Role and stage: layers that the search scales together."""
        return f"{self.role}/{self.stage}"


def inventory(model: nn.Module) -> list[Layer]:
    """Every quantizable layer of `model`, in the model's own order.

    Raises:
        BitPolicyError: there is none, or the model is packed.
    """
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        raise BitPolicyError(
            f"{type(model).__name__} is packed already; give the full-precision model it was made from"
        )
    layers = [
        Layer(
            name,
            type(layer).__name__,
            tuple(layer.weight.shape),
            layer.bias is not None,
            _role(model, name, layer),
            _stage(model, name),
        )
        for name, layer in quantizable_layers(model)
    ]
    if not layers:
        raise BitPolicyError(f"{type(model).__name__} has no linear or convolution layer to quantize")
    return layers


_Rule = Callable[[str, list[str], nn.Module], str | None]


def _role(model: nn.Module, name: str, layer: Quantizable) -> str:
    path = name.split(".")
    ancestors = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path) - 1, 0, -1)]  # nearest first
    for ancestor in ancestors:
        role = _role_within(ancestor, path)
        if role:
            return role
    return _role_by_name(path, layer)


def _role_within(ancestor: nn.Module, path: list[str]) -> str | None:
    """The role that the type of an enclosing module gives, or None."""
    kind, leaf = type(ancestor).__name__, path[-1]
    if "TextProjection" in kind or "ImageProjection" in kind:
        return "context_embedding"
    if kind == "TimestepEmbedding" or leaf == "time_emb_proj":
        return "timestep_embedding"
    if kind.startswith(("AdaLayerNorm", "AdaGroupNorm")):
        return "modulation"
    if hasattr(ancestor, "proj_mlp") and leaf in ("proj_mlp", "proj_out"):
        return "feed_forward"
    if hasattr(ancestor, "to_q") or hasattr(ancestor, "to_qkv"):
        cross = "cross_" if getattr(ancestor, "is_cross_attention", False) else ""
        return f"{cross}attention_out" if "out" in leaf or "to_out" in path else f"{cross}attention_qkv"
    if kind == "FeedForward" or ("GLU" in kind and kind.endswith(("Conv", "Block"))):
        return "feed_forward"
    if "Resnet" in kind or "TemporalConvLayer" in kind:
        return "shortcut" if "shortcut" in leaf else "conv"
    if kind.startswith(("Downsample", "Upsample")):
        return "resample"
    if kind.startswith("Transformer") and leaf in ("proj_in", "proj_out"):
        return "projection"
    return None


_BY_NAME = {
    "input_stem": ("conv_in", "pos_embed", "x_embedder", "patch_embed", "patch_embedding"),
    "output_head": ("conv_out", "proj_out", "proj_out_1", "proj_out_2", "final_layer"),
    "timestep_embedding": ("time_embedding", "time_proj", "time_embed", "timestep_embedder", "add_embedding"),
    "context_embedding": (
        "context_embedder",
        "caption_projection",
        "encoder_hid_proj",
        "text_embedder",
        "condition_embedder",
    ),
    "modulation": ("norm_out", "adaln_single", "norm1", "norm1_context"),
}


def _role_by_name(path: list[str], layer: Quantizable) -> str:
    for role, names in _BY_NAME.items():
        if any(part in names for part in (path[:1] if role == "output_head" else path)):
            return role
    return "other" if isinstance(layer, nn.Linear) else "conv"


def _stage(model: nn.Module, name: str) -> str:
    head, *rest = name.split(".")
    if head.startswith("down_block"):
        return "encoder"
    if head.startswith("mid_block"):
        return "middle"
    if head.startswith("up_block"):
        return "decoder"
    blocks = getattr(model, head)
    if isinstance(blocks, nn.ModuleList) and len(blocks) > 1 and rest and rest[0].isdigit():
        return ("early", "middle", "late")[int(rest[0]) * 3 // len(blocks)]
    return "ends"
