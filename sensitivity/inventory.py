"""The layers of the target, each with its role (what it does) and its stage (where it is).

Each component is described on its own. Outside the denoisers, all layers of a component have the same stage, so the
search scales them by role alone.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from bitpolicy.kernels.errors import BitPolicyError, BitPolicyWarning
from bitpolicy.kernels.layers import HasModules, packed_layers, quantizable_layers, unsupported_layers
from bitpolicy.policies.components import is_autoencoder
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.outside_roles import autoencoder_role, conditioner_role
from bitpolicy.sensitivity.roles import is_attention, roles

CONDITIONING, AUTOENCODER = "conditioning", "autoencoder"
OUTSIDE = (CONDITIONING, AUTOENCODER)  # stages of components outside the sampling loop


@dataclass(frozen=True)
class Layer:
    """One quantizable layer.

    Attributes:
        name: its module path in the component; if the target has several components, it starts with the component's
            name.
        kind: its torch class, e.g. "Conv2d".
        shape: of its weight, (out, in/groups, *kernel).
        has_bias: whether it has a bias that can be corrected.
        role: what it does, e.g. "attention_qkv".
        stage: "encoder", "middle" or "decoder" in a U-Net; "early", "middle" or "late" by depth in a transformer;
            "ends" outside the blocks; "conditioning" in a text or image encoder, "autoencoder" in a VAE.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    has_bias: bool
    role: str
    stage: str

    @property
    def group(self) -> str:
        """Role and stage. The search scales all layers of a group together."""
        return f"{self.role}/{self.stage}"


def inventory(target: Target) -> list[Layer]:
    """Every quantizable layer of the target, in the models' own order.

    Raises:
        BitPolicyError: there is no such layer, or a model is already packed.
    """
    packed = next((type(model).__name__ for model in target.models if any(packed_layers(model))), None)
    if packed is not None:
        raise BitPolicyError(f"{packed} is already packed; give the full-precision model it was made from")
    placed = {
        f"{target.prefix(component)}{name}": place
        for component, model in target.items()
        for name, place in _places(model).items()
    }
    layers = [
        Layer(name, type(layer).__name__, tuple(layer.weight.shape), layer.bias is not None, *placed[name])
        for name, layer in target.layers.items()
    ]
    if not layers:
        raise BitPolicyError(f"no linear or convolution layer to quantize in {' or '.join(target.class_names)}")
    return layers


class UnsupportedLayers(BitPolicyWarning):
    """The warning about layers that no format supports."""


def warn_of_unsupported(target: HasModules) -> None:
    """Warn, in one line, about layers that no format supports. They stay in the storage dtype, and their bytes count.

    The line names the first three layers of each kind.
    """
    found: dict[str, list[str]] = {}
    for name, layer in unsupported_layers(target):
        found.setdefault(type(layer).__name__, []).append(name)
    if found:
        kinds = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for kind, names in found.items()
        ]
        text = f"not quantized, because there is no packed layer for these kinds: {'; '.join(kinds)}"
        warnings.warn(text, UnsupportedLayers, stacklevel=2)


def _places(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Role and stage of every layer of one component."""
    if is_autoencoder(model):
        return {name: (autoencoder_role(model, name), AUTOENCODER) for name, _ in quantizable_layers(model)}
    if isinstance(model, PreTrainedModel):
        return {name: (conditioner_role(model, name), CONDITIONING) for name, _ in quantizable_layers(model)}
    return _places_in_denoiser(model)


def _places_in_denoiser(denoiser: nn.Module) -> dict[str, tuple[str, str]]:
    stages = _stages(denoiser)
    found = roles(denoiser, inside=lambda name: stages[name] != "ends")
    return {name: (role, stages[name]) for name, role in found.items()}


def _stages(denoiser: nn.Module) -> dict[str, str]:
    depths = {block: place for place, block in enumerate(_stacked_blocks(denoiser))}
    return {name: _stage(name.split("."), depths) for name, _ in quantizable_layers(denoiser)}


def _stage(path: list[str], depths: dict[tuple[str, ...], int]) -> str:
    for prefix, stage in (("down_block", "encoder"), ("mid_block", "middle"), ("up_block", "decoder")):
        if path[0].startswith(prefix):
            return stage
    depth = depths.get(tuple(path[:2]))
    return "ends" if depth is None else ("early", "middle", "late")[depth * 3 // len(depths)]


def _stacked_blocks(denoiser: nn.Module) -> list[tuple[str, ...]]:
    """(stack, index) of every block of a transformer, in the order in which the sample passes through them.

    Stacks follow one another: Flux has 19 double blocks, then 38 single blocks. The blocks of a stack contain
    attention. If no list of blocks does, as in models from other libraries, any list of modules counts as a stack.
    """
    children = denoiser.named_children()
    lists = {name: child for name, child in children if isinstance(child, nn.ModuleList) and None not in list(child)}
    attending = {name: blocks for name, blocks in lists.items() if all(map(_attends, blocks))}
    stacks = attending or {name: blocks for name, blocks in lists.items() if all(any(b.children()) for b in blocks)}
    return [(name, str(place)) for name, blocks in stacks.items() for place in range(len(blocks))]


def _attends(block: nn.Module) -> bool:
    return any(is_attention(module) for module in block.modules() if module is not block)
