"""Loading and saving a packed model with either library: shells to read into, checks, and unpacking.

A shell is a packed layer whose tensors are on `meta`. After the tensors have been read, `finish` checks that each is
there, in the dtype of its format, so the model never computes with random or empty tensors.
"""

from __future__ import annotations

import functools
import math
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

_TENSOR_HOOKS = ("group_offloading", "layerwise_casting")  # diffusers' hooks that move or cast single tensors
_FUSED = ("to_qkv", "to_kv", "to_added_qkv")


def make_shells(model: nn.Module, config: BitPolicyConfig) -> None:
    """Replace the layers that the config packs with shells, in place.

    Raises:
        BitPolicyError: the model has no such layer, or its format is unknown or does not fit it.
    """
    layers = dict(quantizable_layers(model))
    for name in config.layers:
        if name not in layers:
            raise BitPolicyError(
                f"the checkpoint packs layer {name!r}, which {type(model).__name__} does not have; download or export "
                "it again"
            )
        format, shape = config.format_of(name), layers[name].weight.shape
        if not format.packed or not format.fits(shape):
            raise BitPolicyError(f"layer {name}: {format.name} cannot pack its shape {tuple(shape)}; export it again")
        specs = format.tensors(shape, config.storage)
        empty = {suffix: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for suffix, spec in specs.items()}
        replace_layer(model, name, pack_layer(layers[name], format, empty))


def packed_names(model: nn.Module) -> set[str]:
    """Names of all packed tensors."""
    return {f"{name}.{suffix}" for name, layer in packed_layers(model) for suffix in layer.packed_tensors()}


def expected_tensors(model: nn.Module, tied: Iterable[str] = ()) -> dict[str, TensorSpec]:
    """The tensors that a model's files must hold: its state dict without the names `tied` to another tensor."""
    left_out = set(tied)
    return {
        name: TensorSpec(tensor.dtype, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in left_out
    }


def finish(model: nn.Module, compute_dtype: Callable[[str], torch.dtype], compute: Compute) -> None:
    """Check what was read, and set the compute dtype and the compute mode of each packed layer.

    Args:
        compute_dtype: layer name -> the dtype of its `weight`.
        compute: compute mode of all packed layers.

    Raises:
        BitPolicyError: a tensor was not read, or was cast.
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
                    f"{name}.{suffix} was read as {tensor.dtype}, but is stored as {specs[suffix].dtype}; load without "
                    "offload_state_dict"
                )
        layer.compute_dtype, layer.compute = compute_dtype(name), compute


def count_packed_weights(kind: type[Any]) -> None:
    """Make `num_parameters` of a library's base model class count packed weights, as they were before packing.

    They are not torch parameters, so the library would leave them out and report thousands instead of billions. The
    method is wrapped on the class, because wrapping it on an instance would create a reference cycle.
    """
    counted = kind.num_parameters
    if getattr(counted, "counts_packed_weights", False):
        return

    @functools.wraps(counted)
    def num_parameters(self: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        packed = () if only_trainable else packed_layers(self)  # none is trainable, and none is an embedding
        weights = sum(math.prod(layer.weight_shape) for _, layer in packed)
        return int(counted(self, only_trainable, exclude_embeddings)) + weights

    num_parameters.counts_packed_weights = True  # type: ignore[attr-defined]
    kind.num_parameters = num_parameters


def refuse_disk(device_map: object) -> None:
    """Refuse to offload to disk, because that casts tensors, and would cast scales, too."""
    if isinstance(device_map, Mapping) and "disk" in map(str, device_map.values()):
        raise BitPolicyError("packed tensors cannot be offloaded to disk; remove 'disk' from device_map")


def unpack_model(model: nn.Module) -> None:
    """Replace every packed layer with an ordinary one that has the dequantized weight, in place.

    Layers that accelerate offloads stay offloaded.

    Raises:
        BitPolicyError: diffusers offloads or casts the layers, with hooks that refer to single packed tensors.
    """
    for module in model.modules():
        held = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if any(name in held for name in _TENSOR_HOOKS):
            raise BitPolicyError(
                f"{type(model).__name__} has diffusers' {', '.join(held)} on its layers; dequantize it first, then "
                "offload or cast it (to end group offloading, call remove_hook('group_offloading') of its HookRegistry)"
            )
    for name, layer in list(packed_layers(model)):
        replace_layer(model, name, _unpacked_with_its_hook(layer))


def _unpacked_with_its_hook(layer: PackedLayer) -> nn.Module:
    """The unpacked layer with the same accelerate hook. Removing the hook brings offloaded tensors back, and adding it
    offloads them again."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is None:
        return unpack_layer(layer)
    remove_hook_from_module(layer)
    if isinstance(hook, AlignDevicesHook):
        hook.weights_map = None  # it lists the packed tensors
    return add_hook_to_module(unpack_layer(layer), hook)


def to_save(state: Mapping[str, torch.Tensor], packed: set[str], storage: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors to write. An unpacked float is written in the storage dtype if that holds it exactly, otherwise in
    float32.

    So a model is saved as it was stored, whatever dtype it was loaded in and whether or not its projections were
    fused. Shared tensors stay shared.

    Raises:
        BitPolicyError: the model has an adapter.
    """
    if adapted := next((name for name in state if ".base_layer." in name), None):
        raise BitPolicyError(
            f"the model has an adapter on it, e.g. on {adapted.partition('.base_layer.')[0]}; unload it, or fuse and "
            "unload it, before saving"
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
    """Whether diffusers' `fuse_qkv_projections` made this tensor from others that `state` still has, too."""
    attention, _, leaf = name.rpartition(".")[0].rpartition(".")
    return leaf in _FUSED and any(other.startswith(f"{attention}.to_k.") for other in state)


def _exactly(tensor: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    stored = tensor.to(storage)
    return stored if torch.equal(stored.to(tensor.dtype), tensor) else tensor.float()
