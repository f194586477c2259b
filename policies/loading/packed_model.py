"""What loading a packed model takes, whichever library loads it: shells to read into, checks, and the way back.

A shell is a packed layer whose tensors lie on `meta`. Once the tensors are read, `finish` makes sure that every one is
there and as its format says, so nothing random and nothing empty is ever computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import (
    PackedLayer,
    pack_layer,
    packed_layers,
    quantizable_layers,
    replace_layer,
    unpack_layer,
)
from bitpolicy.policies.loading.packed_config import BitPolicyConfig

_KNOW_TENSORS = ("group_offloading", "layerwise_casting")  # diffusers' hooks that move or cast single tensors
_FUSED = ("to_qkv", "to_kv", "to_added_qkv")


def make_shells(model: nn.Module, config: BitPolicyConfig) -> None:
    """Replace the layers that the config packs by shells, in place.

    Raises:
        BitPolicyError: the model has no such layer, or its format is unknown or does not fit it.
    """
    layers = dict(quantizable_layers(model))
    for name in config.layers:
        if name not in layers:
            raise BitPolicyError(f"the checkpoint packs layer {name!r}, which {type(model).__name__} does not have")
        format, shape = config.format_of(name), layers[name].weight.shape
        if not format.packed or not format.fits(shape):
            raise BitPolicyError(f"layer {name}: {format.name} does not pack its shape {tuple(shape)}; export it again")
        specs = format.tensors(shape, config.storage)
        empty = {suffix: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for suffix, spec in specs.items()}
        replace_layer(model, name, pack_layer(layers[name], format, empty))


def packed_names(model: nn.Module) -> set[str]:
    """Names of all packed tensors."""
    return {f"{name}.{suffix}" for name, layer in packed_layers(model) for suffix in layer.packed_tensors()}


def expected_tensors(model: nn.Module, tied: Iterable[str] = ()) -> dict[str, TensorSpec]:
    """What the files of a model have to hold: its state dict, less the names `tied` to another."""
    left_out = set(tied)
    return {
        name: TensorSpec(tensor.dtype, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in left_out
    }


def finish(model: nn.Module, compute_dtype: Callable[[str], torch.dtype], compute: Compute) -> None:
    """Check what was read, and tell each packed layer the dtype that its `weight` is to have, and how to multiply.

    Args:
        compute_dtype: of the layer with this name.
        compute: of all of them.

    Raises:
        BitPolicyError: a tensor was not read, or not kept as it is stored.
    """
    lost = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    if lost:
        raise BitPolicyError(
            f"the checkpoint lacks {len(lost)} tensors, e.g. {lost[0]}; download or export it again (packed tensors "
            "cannot be offloaded to disk)"
        )
    for name, layer in packed_layers(model):
        specs = layer.format.tensors(layer.weight_shape, torch.float16)
        for suffix, tensor in layer.packed_tensors().items():
            if tensor.dtype != specs[suffix].dtype:
                raise BitPolicyError(
                    f"{name}.{suffix} was read as {tensor.dtype}, it is stored in {specs[suffix].dtype}; load without "
                    "offload_state_dict"
                )
        layer.compute_dtype, layer.compute = compute_dtype(name), compute


def refuse_disk(device_map: object) -> None:
    """Refuse to offload to disk: what is offloaded is cast, and scales would be too."""
    if isinstance(device_map, Mapping) and "disk" in map(str, device_map.values()):
        raise BitPolicyError("packed tensors cannot be offloaded to disk; leave it out of device_map")


def unpack_model(model: nn.Module) -> None:
    """Replace every packed layer by an ordinary one with the dequantized weight, in place.

    What accelerate offloads stays offloaded.

    Raises:
        BitPolicyError: diffusers offloads or casts its layers: its hooks know the packed tensors one by one.
    """
    for module in model.modules():
        held = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if any(name in held for name in _KNOW_TENSORS):
            raise BitPolicyError(
                f"{type(model).__name__} has diffusers' {', '.join(held)} on its layers; dequantize it first, then "
                "offload or cast it (group offloading is lifted by remove_hook('group_offloading') of its HookRegistry)"
            )
    for name, layer in list(packed_layers(model)):
        replace_layer(model, name, _unpacked_with_its_hook(layer))


def _unpacked_with_its_hook(layer: PackedLayer) -> nn.Module:
    """Tensors that accelerate has offloaded come back when its hook goes, and are offloaded anew by the same hook."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is None:
        return unpack_layer(layer)
    remove_hook_from_module(layer)
    if isinstance(hook, AlignDevicesHook):
        hook.weights_map = None  # it names the packed tensors
    return add_hook_to_module(unpack_layer(layer), hook)


def to_save(state: Mapping[str, torch.Tensor], packed: set[str], storage: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors to write: an unpacked float goes in the storage dtype if that holds it exactly, in float32 if not.

    So a model is saved as it was stored, whatever dtype it was loaded in and whether or not its projections were
    fused. Tensors that are one stay one.

    Raises:
        BitPolicyError: an adapter is on the model.
    """
    if adapted := next((name for name in state if ".base_layer." in name), None):
        raise BitPolicyError(
            f"the model has an adapter on it, e.g. on {adapted.partition('.base_layer.')[0]}; unload it (or fuse and "
            "unload it) before saving"
        )
    written = {name: tensor for name, tensor in state.items() if not _is_fused(name, state)}
    cast: dict[Any, torch.Tensor] = {}
    for name in written.keys() - packed:
        tensor = state[name]
        if tensor.is_floating_point() and tensor.dtype != storage:
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            written[name] = cast[place] = cast[place] if place in cast else _exactly(tensor, storage)
    return written


def _is_fused(name: str, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether diffusers' `fuse_qkv_projections` made this tensor of others that are here, too, and left it behind."""
    attention, _, leaf = name.rpartition(".")[0].rpartition(".")
    return leaf in _FUSED and any(other.startswith(f"{attention}.to_k.") for other in state)


def _exactly(tensor: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    stored = tensor.to(storage)
    return stored if torch.equal(stored.to(tensor.dtype), tensor) else tensor.float()
