"""Pack a full-precision model while its tensors are read, one layer at a time.

The result is bit for bit the same as exporting the model and loading the checkpoint: every float passes through the
storage dtype, and weights and biases through `quantize_layer`. An ordinary layer stays on `meta` until its weight is
read. Then a packed layer replaces it, so there is never more than one layer in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import Quantizable, pack_layer, quantizable_layers, replace_layer
from bitpolicy.policies.apply import choices_for, quantize_layer
from bitpolicy.policies.finite import require_finite, warn_of_biases
from bitpolicy.policies.identity import tensors_hash
from bitpolicy.policies.loading.packed_config import BitPolicyConfig
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.policy_records import ModelReference
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.calibration_file import calibration_of


class PackedWhileRead:
    """Takes the tensors of `model` as they are read, and returns those to keep.

    Args:
        policy: for this model, or for several components including it.
        path: of the policy; None for a policy that holds its calibration.
        model: on `meta`, with ordinary layers only.
        read: returns the tensor with a state-dict name. Every tensor is read once, to compare the hash with the
            policy's.

    Attributes:
        config: the `quantization_config` of the packed model.

    Raises:
        BitPolicyError: the policy is for another class, other layers or other weights, or its calibration is missing.
    """

    def __init__(
        self, policy: Policy, path: Path | None, model: nn.Module, read: Callable[[str], torch.Tensor]
    ) -> None:
        self._model = model
        self._layers: dict[str, Quantizable] = dict(quantizable_layers(model))
        self._storage = getattr(torch, policy.storage_dtype)
        components = policy.model.components
        component = _component(policy.model, model, read, self._storage)
        policy.model.require_config(component, model)
        choices = choices_for(model, policy, component if len(components) > 1 else None)
        calibration = calibration_of(policy, path, choices.values())
        whole = Quantization(calibration=calibration, storage=self._storage, compute=Compute(policy.compute))
        self._quantization = whole.of_component(component, components)
        self._choices = {name: choice for name, choice in choices.items() if choice.format.packed}
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._uncorrected: list[str] = []
        self.config = BitPolicyConfig.of(self._choices, self._storage, compute=self._quantization.compute)

    def take(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors to keep, by name, now that tensor `name` was read; none until a layer has both weight and bias.

        Args:
            tensor: as it is in the file, on its target device.

        Raises:
            BitPolicyError: the tensor's shape is not the model's, or a weight cannot be quantized.
        """
        if tensor.shape != self._shapes[name]:
            raise BitPolicyError(
                f"{name} has shape {tuple(tensor.shape)}, needed {tuple(self._shapes[name])}; download it again"
            )
        rounded = self._rounded(name, tensor)
        layer, _, leaf = name.rpartition(".")
        if layer not in self._choices or leaf not in ("weight", "bias"):
            return {name: rounded}
        got = self._waiting.setdefault(layer, {})
        got[leaf] = rounded
        if self._layers[layer].bias is not None and len(got) < 2:
            return {}
        return self._pack(layer, **self._waiting.pop(layer))

    def require_all_taken(self) -> None:
        """Check at the end that every layer was packed, and warn of biases that could not be corrected.

        Raises:
            BitPolicyError: a layer's weight or bias was not read.
        """
        unpacked = [name for name, layer in quantizable_layers(self._model) if name in self._choices]
        if unpacked:
            raise BitPolicyError(f"the model's files lack the weight or bias of {unpacked[0]}; download them again")
        warn_of_biases(self._uncorrected, self._storage)

    def _pack(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        layer = self._layers[name]
        choice = self._choices[name]
        stored = quantize_layer(name, _with_values(layer, weight, bias), choice, quantization=self._quantization)
        self._uncorrected += [name] * stored.left_as_it_was
        packed = pack_layer(layer, choice.format, stored.tensors)
        replace_layer(self._model, name, packed)
        found = {f"{name}.{suffix}": tensor for suffix, tensor in stored.tensors.items()}
        require_finite(name, found)
        return found if stored.bias is None else {f"{name}.bias": stored.bias, **found}

    def _rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        rounded = tensor.to(TensorSpec.stored(tensor, self._storage).dtype)
        if rounded.is_floating_point() and not torch.isfinite(rounded).all():
            raise BitPolicyError(
                f"{name} has values that {self._storage} cannot hold; give a policy with storage_dtype: bfloat16"
            )
        return rounded


def _component(
    about: ModelReference, model: nn.Module, read: Callable[[str], torch.Tensor], storage: torch.dtype
) -> str:
    """Which of the policy's components `model` is, by its class and the hash of its weights."""
    kind = type(model).__name__
    candidates = about.components_of(kind)
    if not candidates:
        raise BitPolicyError(
            f"the policy was made for the {about.component} of {about.id}, a {about.class_name}, but this is a {kind}; "
            "name that component in components_to_quantize, or load that model"
        )
    found = tensors_hash(((name, read(name)) for name in sorted(model.state_dict())), storage)
    component = next((name for name in candidates if about.hashes[name] == found), None)
    if component is None:
        wanted = " or ".join(f"{about.hashes[name][:12]}..." for name in candidates)
        raise BitPolicyError(
            f"the policy was made for {about.id} ({kind}, sha256 {wanted}), but these weights have sha256 "
            f"{found[:12]}...; load that model, or run search-policy on this one"
        )
    return component


def _with_values(layer: Quantizable, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """A stand-in for `layer` with its geometry and the tensors that were read."""
    twin = object.__new__(type(layer))
    twin.__dict__.update(vars(layer))
    twin._parameters = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": None if bias is None else nn.Parameter(bias, requires_grad=False),
    }
    return twin
