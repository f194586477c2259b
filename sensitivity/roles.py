"""The role of each quantizable layer of a denoiser: what the layer does.

The rules look at the modules around a layer first, starting with the nearest. A module that projects queries is
attention. Next to attention in a block, a network of two or more layers is the feed-forward network, and a single layer
is the modulation. A layer in a normalization shifts and scales it. The linear layer in a convolution block takes in the
timestep.

Outside the blocks, the sample's shape identifies both ends: the input stem reads `in_channels` numbers per patch, and
the output head writes `out_channels`. A layer that widens the trunk by a whole factor computes shifts and scales. Names
decide the remaining layers, and choose between layers of the same shape. A layer that matches no rule is `other`.

In joint attention, the context's own projections (`add_q_proj`, `to_add_out`) count as cross attention, because the
conditioning enters through them. Whatever is embedded like the timestep and joined with it (guidance, sizes, the
position of a frame) counts as timestep. Projected, pooled or embedded texts and images count as context.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from torch import nn

from bitpolicy.kernels.layers import Quantizable, quantizable_layers

# what configs call the number of channels of the sample
_CHANNELS = ("in_channels", "io_channels", "latent_dim", "embedding_dim", "c_in")
_QUERY = re.compile(r"((to|img|img_attn)_)?(q|qkv|query)(_proj|_linear|_mlp_proj)?|wq")


@dataclass(frozen=True)
class _Site:
    """A layer, seen from one of the modules around it.

    Attributes:
        module: the module around the layer.
        name: the module's own name in its parent.
        below: the names from the module down to the layer.
    """

    module: nn.Module
    name: str
    below: tuple[str, ...]
    layer: Quantizable

    @property
    def word(self) -> str:
        """The layer's own name, without list indices: `to_out` for `to_out.0`."""
        return next((name for name in reversed(self.below) if not name.isdigit()), "")

    def typed(self, pattern: str) -> bool:
        """Whether `pattern` is found in the name of the module's class or of one of its base classes."""
        return any(re.search(pattern, kind.__name__) for kind in type(self.module).__mro__)


def roles(model: nn.Module, inside: Callable[[str], bool]) -> dict[str, str]:
    """The role of every quantizable layer of the denoiser `model`, by name.

    Args:
        inside: whether the layer of a given name is in one of the model's blocks.
    """
    layers = dict(quantizable_layers(model))
    found = {name: _from_around(model, name, layer) for name, layer in layers.items()}
    outside = {name: layer for name, layer in layers.items() if not inside(name)}
    found |= _ends(model, outside, found)
    found |= {name: _from_name(name) for name in outside if found[name] is None}
    return {name: found[name] or _from_kernel(layer, inside(name)) for name, layer in layers.items()}


def is_attention(module: nn.Module) -> bool:
    """Whether the module projects queries."""
    names = (name for name, _ in module.named_children())
    return isinstance(module, nn.MultiheadAttention) or any(map(_QUERY.fullmatch, names))


# Roles from the modules around a layer


def _from_around(model: nn.Module, name: str, layer: Quantizable) -> str | None:
    for site in _sites(model, name, layer):
        for rule in _RULES:
            if role := rule(site):
                return role
    return None


def _sites(model: nn.Module, name: str, layer: Quantizable) -> Iterator[_Site]:
    """The layer as seen from each module around it, nearest first. The model itself is left out."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        module = model.get_submodule(".".join(path[:depth]))
        yield _Site(module, path[depth - 1], tuple(path[depth:]), layer)


def _context(site: _Site) -> str | None:
    what, rest = "(Text|Image|Caption|Hint|Label|Conditioning)", "(Time|Boundingbox)?(Projection|Embed)"
    kinds = rf"^(?!\w*Time(step)?(Text|Image))\w*{what}{rest}"
    return "context_embedding" if site.typed(kinds) or site.typed("AttentionPool") else None


def _timestep(site: _Site) -> str | None:
    kinds = r"^(?!\w*(Text|Image|Caption|Combined))\w*Time(step)?s?(Embed|Proj|Block)"
    return "timestep_embedding" if site.typed(kinds) else None


def _attention(site: _Site) -> str | None:
    if not is_attention(site.module):
        return None
    added = re.search(r"add|_ip$|_t$|^(txt|text|context)_", site.word)
    crossing = "cross_" if added or _is_cross(site) else ""
    return f"{crossing}attention_{'out' if re.search(r'out|^proj(_attn)?$|attn_proj$', site.word) else 'qkv'}"


def _is_cross(site: _Site) -> bool:
    """Whether this is cross attention: by the module's own flag, else by the widths of queries and keys, or by name."""
    flag = getattr(site.module, "is_cross_attention", None)
    if flag is not None:
        return bool(flag)
    query, key = (getattr(getattr(site.module, name, None), "in_features", None) for name in ("to_q", "to_k"))
    return query != key or site.typed("CrossAttention") or bool(re.search(r"cross|attn2", site.name))


def _residual(site: _Site) -> str | None:
    """The role of a layer in a convolution block. A linear layer directly in the block takes in the timestep, but the
    linear layers of a ConvNeXt block work on its channels, and the one for the condition shifts and scales them."""
    if site.typed("ConvNext") and isinstance(site.layer, nn.Linear):
        return "modulation" if "cond" in site.word else "feed_forward"
    if not site.typed(r"Resnet|Res(Net|Conv|idual\w*)?Block|TemporalConvLayer"):
        return None
    if isinstance(site.layer, nn.Linear):
        return "timestep_embedding" if len(site.below) == 1 else "feed_forward"
    return "shortcut" if re.search("shortcut|skip|residual", site.below[0]) else "conv"


def _resampling(site: _Site) -> str | None:
    return "resample" if site.typed(r"^(?!\w*Block)\w*(Down|Up)sample") else None


def _modulation(site: _Site) -> str | None:
    return "modulation" if site.typed("Norm|Modulation|AdaLN") else None


def _in_attention_block(site: _Site) -> str | None:
    if not _is_block(site.module):
        return None
    if len(site.below) > 1:
        network = list(quantizable_layers(site.module.get_submodule(site.below[0])))
        return "feed_forward" if len(network) > 1 else "modulation"
    parallel = (
        hasattr(site.module, "proj_mlp") and site.word == "proj_out"
    )  # in Flux's single blocks, attention and feed-forward network share this output layer
    if parallel or re.search(r"mlp|^ff|(gate|up|down)_proj", site.word):
        return "feed_forward"
    return "modulation" if re.search("norm|mod|shift", site.word) else "projection"


def _next_to_blocks(site: _Site) -> str | None:
    """The role of a layer directly next to a stack of blocks, which leads into the stack or out of it."""
    stacks = [child for child in site.module.children() if isinstance(child, nn.ModuleList)]
    leads = len(site.below) == 1 and any(_is_block(block) for stack in stacks for block in stack)
    return "projection" if leads else None


def _between_networks(site: _Site) -> str | None:
    """The role of a layer that leads from one network to another inside a block, as `ctrl_to_base` of ControlNet-XS."""
    return "projection" if re.search(r"[^\W_]_to_[^\W_]", site.below[0]) else None


def _is_block(module: nn.Module) -> bool:
    return any(is_attention(child) for child in module.children())


_RULES = (
    _context,
    _timestep,
    _attention,
    _residual,
    _resampling,
    _modulation,
    _in_attention_block,
    _next_to_blocks,
    _between_networks,
)


# Roles from the shape of the sample


def _ends(model: nn.Module, outside: Mapping[str, Quantizable], found: Mapping[str, str | None]) -> dict[str, str]:
    """The layers where the sample enters and leaves, and those that widen the trunk into shifts and scales."""
    reads, writes = _sample_widths(model)
    free = {name: layer for name, layer in outside.items() if found[name] is None}
    writers = [name for name, layer in outside.items() if layer.weight.shape[0] in writes]
    heads = [name for name in writers if name in free and name.startswith("proj_to_")]
    heads = heads or _named_for("output_head", [name for name in reversed(writers) if name in free])
    # Lumina's head is part of its last normalization.
    heads = heads or [name for name in writers if found[name] == "modulation"][-1:]
    stems = _named_for("input_stem", [name for name, layer in free.items() if _fan_in(layer) in reads])
    trunk = {_fan_in(outside[name]) for name in heads if isinstance(outside[name], nn.Linear)}
    widening = [name for name, layer in free.items() if _fan_in(layer) in trunk and _widens(layer)]
    by_role = {"modulation": widening, "input_stem": stems, "output_head": heads}
    return {name: role for role, names in by_role.items() for name in names}


def _named_for(role: str, names: list[str]) -> list[str]:
    """Of layers with the right shape for `role`, those whose name suggests it; else the first with an unclear name."""
    named = {name: _from_name(name) for name in names}
    return [name for name in names if named[name] == role] or [name for name in names if named[name] is None][:1]


def _sample_widths(model: nn.Module) -> tuple[set[int], set[int]]:
    """The possible numbers of values per position of the sample (channels x patch), on input and on output."""
    config = getattr(model, "config", None)
    known = config if isinstance(config, Mapping) else {}
    channels = next((known[name] for name in _CHANNELS if isinstance(known.get(name), int)), None)
    if channels is None:
        return set(), set()
    patches = (value for key, value in known.items() if "patch_size" in key)
    sides = {1, *(n for value in patches for n in (value if isinstance(value, list | tuple) else [value]) if n)}
    volumes = {prod(sizes) for sizes in product(sides, repeat=3)}
    written = known.get("out_channels") or channels
    return {channels * volume for volume in volumes}, {written * volume for volume in volumes}


def _fan_in(layer: Quantizable) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _widens(layer: Quantizable) -> bool:
    out, fan_in = layer.weight.shape[:2]
    return isinstance(layer, nn.Linear) and out > fan_in and out % fan_in == 0


# Roles from names and kernels

_WORDS = {
    "modulation": {"mod", "modulation", "modulations", "adaln", "norm"},
    "context_embedding": set("context caption cap text txt y prompt class label encoder image clip siglip".split())
    | {"cond", "condition", "control", "pose", "vace", "cross", "effnet"},
    "timestep_embedding": {"time", "timestep", "t", "guidance", "fps", "size", "global"},
}
_FIRST_PARTS = {
    "output_head": r"(^|_)((proj|conv)_(out|to)|final_)"
    r"|^(postprocess_|out_layer|mlm_layer|(out|clf)$|controlnet_(\w+_)?blocks?$)",
    "input_stem": r"(^|_)(proj|conv|img)_in|^(preprocess_|x_embedder|visual_embed|input_|pos_embed)|patch_embed",
    "context_embedding": "^(controlnet|latent|embedding)_",
    "resample": "(down|up)scalers$",
    "projection": "_mappers$|^project_(to|from)_",
}


def _from_name(name: str) -> str | None:
    """The role from a word of the name, nearest to the layer first, or else from the name of its part of the model."""
    parts = name.lower().split(".")
    for part in reversed(parts):
        words = set(re.split(r"[_\d]+", part))
        if role := next((role for role, telling in _WORDS.items() if words & telling), None):
            return role
    return next((role for role, pattern in _FIRST_PARTS.items() if re.search(pattern, parts[0])), None)


def _from_kernel(layer: Quantizable, inside: bool) -> str:
    """The role from the kernel alone: "other" unless the kernel covers more than one position."""
    if isinstance(layer, nn.Linear) or prod(layer.kernel_size) == 1:
        return "other"
    return "resample" if inside and prod(layer.stride) > 1 else "conv"
