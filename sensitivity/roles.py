"""What each quantizable layer of a denoiser does: its role.

The modules around a layer are asked first, the nearest first. A module that projects queries is attention; beside it in
a block stand the feed-forward network, of two layers or more, and the modulation, of one; a layer in a normalization
shifts and scales it; the linear layer in a block of convolutions lets the timestep in. Outside the blocks the sample's
shape finds the ends: the input stem reads `in_channels` numbers a patch, the output head writes `out_channels`, and
what widens the trunk by a whole factor makes shifts and scales. Names decide what is left, and between layers of one
shape. What no rule knows is `other`.

In joint attention the context's own projections (`add_q_proj`, `to_add_out`) are cross attention: through them the
conditioning comes in. What is embedded like the timestep and joins it (guidance, sizes, the place of a frame) counts as
timestep; texts and images that are projected, pooled or embedded are context.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from torch import nn

from bitpolicy.kernels.layers import Quantizable, quantizable_layers

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
        """The layer's own name, without the places in lists: `to_out` for `to_out.0`."""
        return next((name for name in reversed(self.below) if not name.isdigit()), "")

    def typed(self, pattern: str) -> bool:
        """Whether the module is of a class so named, or of one derived from it."""
        return any(re.search(pattern, kind.__name__) for kind in type(self.module).__mro__)


def roles(model: nn.Module, inside: Callable[[str], bool]) -> dict[str, str]:
    """The role of every quantizable layer of the denoiser `model`, by name.

    Args:
        inside: whether a name is that of a layer of the model's blocks.
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


# From the modules around a layer


def _from_around(model: nn.Module, name: str, layer: Quantizable) -> str | None:
    for site in _sites(model, name, layer):
        for rule in _RULES:
            if role := rule(site):
                return role
    return None


def _sites(model: nn.Module, name: str, layer: Quantizable) -> Iterator[_Site]:
    """The layer as seen from the modules around it, nearest first; the model itself says nothing."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        module = model.get_submodule(".".join(path[:depth]))
        yield _Site(module, path[depth - 1], tuple(path[depth:]), layer)


def _context(site: _Site) -> str | None:
    kinds = r"^(?!\w*Time(step)?(Text|Image))\w*(Text|Image|Caption|Hint|Label|Conditioning)(Time)?(Projection|Embed)"
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
    """The module's own flag says so, or keys of another width than the queries, or, last, its name."""
    flag = getattr(site.module, "is_cross_attention", None)
    if flag is not None:
        return bool(flag)
    query, key = (getattr(getattr(site.module, name, None), "in_features", None) for name in ("to_q", "to_k"))
    return query != key or site.typed("CrossAttention") or bool(re.search(r"cross|attn2", site.name))


def _residual(site: _Site) -> str | None:
    """In a block of convolutions, what is no convolution takes the timestep in."""
    if not site.typed(r"Resnet|Res(Net|Conv|idual\w*)?Block|TemporalConvLayer"):
        return None
    if isinstance(site.layer, nn.Linear):
        return "timestep_embedding" if len(site.below) == 1 else "feed_forward"
    return "shortcut" if re.search("shortcut|skip|residual", site.below[0]) else "conv"


def _resampling(site: _Site) -> str | None:
    return "resample" if site.typed(r"^(?!\w*Block)\w*(Down|Up)sample") else None


def _modulation(site: _Site) -> str | None:
    return "modulation" if site.typed("Norm|Modulation|AdaLN") else None


def _beside_attention(site: _Site) -> str | None:
    if not _is_block(site.module):
        return None
    if len(site.below) > 1:
        network = list(quantizable_layers(site.module.get_submodule(site.below[0])))
        return "feed_forward" if len(network) > 1 else "modulation"
    parallel = (
        hasattr(site.module, "proj_mlp") and site.word == "proj_out"
    )  # Flux's single blocks: both ways out in one
    if parallel or re.search(r"mlp|^ff|(gate|up|down)_proj", site.word):
        return "feed_forward"
    return "modulation" if re.search("norm|mod|shift", site.word) else "projection"


def _around_blocks(site: _Site) -> str | None:
    """The layers right beside a stack of blocks lead into it and out of it."""
    stacks = [child for child in site.module.children() if isinstance(child, nn.ModuleList)]
    leads = len(site.below) == 1 and any(_is_block(block) for stack in stacks for block in stack)
    return "projection" if leads else None


def _is_block(module: nn.Module) -> bool:
    return any(is_attention(child) for child in module.children())


_RULES = (_context, _timestep, _attention, _residual, _resampling, _modulation, _beside_attention, _around_blocks)


# From the shape of the sample


def _ends(model: nn.Module, outside: Mapping[str, Quantizable], found: Mapping[str, str | None]) -> dict[str, str]:
    """Where the sample comes in and goes out, and what widens the trunk's width into shift and scale."""
    reads, writes = _sample_widths(model)
    free = {name: layer for name, layer in outside.items() if found[name] is None}
    writers = [name for name, layer in outside.items() if layer.weight.shape[0] in writes]
    heads = _so_named("output_head", [name for name in reversed(writers) if name in free])
    # Lumina's head is a part of its last normalization.
    heads = heads or [name for name in writers if found[name] == "modulation"][-1:]
    stems = _so_named("input_stem", [name for name, layer in free.items() if _fan_in(layer) in reads])
    trunk = {_fan_in(outside[name]) for name in heads if isinstance(outside[name], nn.Linear)}
    widening = [name for name, layer in free.items() if _fan_in(layer) in trunk and _widens(layer)]
    by_role = {"modulation": widening, "input_stem": stems, "output_head": heads}
    return {name: role for role, names in by_role.items() for name in names}


def _so_named(role: str, names: list[str]) -> list[str]:
    """Of layers with the shape that `role` asks for, those with such a name; else the first with no telling name."""
    told = {name: _from_name(name) for name in names}
    return [name for name in names if told[name] == role] or [name for name in names if told[name] is None][:1]


def _sample_widths(model: nn.Module) -> tuple[set[int], set[int]]:
    """How many values one place of the sample may have as it comes in and as it goes out: channels x patch."""
    config = getattr(model, "config", None)
    channels = config.get("in_channels") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(channels, int):
        return set(), set()
    patches = (value for key, value in config.items() if "patch_size" in key)
    sides = {1, *(n for value in patches for n in (value if isinstance(value, list | tuple) else [value]) if n)}
    volumes = {prod(sizes) for sizes in product(sides, repeat=3)}
    written = config.get("out_channels") or channels
    return {channels * volume for volume in volumes}, {written * volume for volume in volumes}


def _fan_in(layer: Quantizable) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _widens(layer: Quantizable) -> bool:
    out, fan_in = layer.weight.shape[:2]
    return isinstance(layer, nn.Linear) and out > fan_in and out % fan_in == 0


# From names and kernels

_WORDS = {
    "modulation": {"mod", "modulation", "modulations", "adaln", "norm"},
    "context_embedding": set("context caption cap text txt y prompt class label encoder image clip".split())
    | {"cond", "condition", "control", "pose", "vace"},
    "timestep_embedding": {"time", "timestep", "t", "guidance", "fps", "size"},
}
_FIRST_PARTS = {
    "output_head": r"(^|_)(proj|conv)_(out|to)|^final_|^out_layer|^controlnet_(\w+_)?blocks?$",
    "input_stem": r"(^|_)(proj|conv|img)_in|^(x_embedder|visual_embed|input_proj|input_embed|pos_embed)|patch_embed",
    "context_embedding": "^controlnet_",
}


def _from_name(name: str) -> str | None:
    """A word of the name, the nearest to the layer first, or else the name of the part of the model it belongs to."""
    parts = name.lower().split(".")
    for part in reversed(parts):
        words = set(re.split(r"[_\d]+", part))
        if role := next((role for role, telling in _WORDS.items() if words & telling), None):
            return role
    return next((role for role, pattern in _FIRST_PARTS.items() if re.search(pattern, parts[0])), None)


def _from_kernel(layer: Quantizable, inside: bool) -> str:
    """A convolution is one wherever it stands, if it sees more than one place."""
    if isinstance(layer, nn.Linear) or prod(layer.kernel_size) == 1:
        return "other"
    return "resample" if inside and prod(layer.stride) > 1 else "conv"
