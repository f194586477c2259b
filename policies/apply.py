"""Apply a policy to a model in memory, as packed layers or as ordinary layers with dequantized weights.

Both compute the same bits; under INT8 and FP8 compute they agree up to the rounding of sums. Search and probes use
ordinary layers, which are fast and can be restored at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from bitpolicy.kernels.cpu.dequantize import unpacked
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.grid import GridFormat
from bitpolicy.kernels.formats.row_chunks import each_chunk
from bitpolicy.kernels.kernel import PackedWeight
from bitpolicy.kernels.layers import (
    HasModules,
    Quantizable,
    pack_layer,
    quantizable_layers,
    replace_layer,
    unsupported_layers,
)
from bitpolicy.kernels.quantizers.bias_correction import bias_shift, corrected_bias
from bitpolicy.kernels.quantizers.named import HESSIANS, quantize_data_free
from bitpolicy.policies.calibration import Calibration, RoundedKey
from bitpolicy.policies.finite import is_finite
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.rounded_layers import multiplied_weight, packed_weight, round_inputs, rounds_inputs
from bitpolicy.policies.target import Target


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer as it is stored.

    Attributes:
        tensors: the tensors of its format, by suffix.
        bias: in the storage dtype; None if the layer has no bias.
        left_as_it_was: whether the bias was not corrected, although the choice asks for it, because the corrected
            bias would exceed the storage dtype's range.
    """

    tensors: dict[str, torch.Tensor]
    bias: torch.Tensor | None
    left_as_it_was: bool = False


def choices_for(model: HasModules, policy: Policy, component: str | None = None) -> dict[str, Choice]:
    """The policy's choice for each layer of a target, or of one of its models. Either may be on `meta`.

    Args:
        component: the model's name, if it is one of several components that the policy covers; None if `model` is all
            that the policy covers.

    Raises:
        PolicyError: the policy does not fit the model.
    """
    start = "" if component is None else f"{component}."
    unsupported = {start + name: type(layer).__name__ for name, layer in unsupported_layers(model)}
    choices = policy.resolve((start + name for name, _ in quantizable_layers(model)), unsupported, component)
    return {name.removeprefix(start): choice for name, choice in choices.items()}


def quantize_layer(name: str, layer: Quantizable, choice: Choice, *, quantization: Quantization) -> QuantizedLayer:
    """Quantize one layer's weight, cast to the storage dtype, and correct its bias if the choice says so.

    Raises:
        BitPolicyError: the weight is not finite, or the calibration lacks what the choice needs.
    """
    weight = layer.weight.detach().to(quantization.storage)
    bias = None if layer.bias is None else layer.bias.detach()
    return quantize_tensors(name, layer, weight, bias, choice, quantization.calibration)


def quantize_tensors(
    name: str,
    layer: Quantizable,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    choice: Choice,
    calibration: Calibration,
) -> QuantizedLayer:
    """Like `quantize_layer`, for a layer whose tensors are stored elsewhere, such as one on `meta`.

    Args:
        layer: gives the kind of layer; its own tensors are not read.
        weight: in the storage dtype.
        bias: in any float dtype, if the layer has one.
    """
    tensors = stored_weight(name, weight, choice, calibration)
    if bias is None:
        return QuantizedLayer(tensors, None)
    plain = as_stored(f"{name}.bias", bias, weight.dtype)
    if not choice.bias_correction:
        return QuantizedLayer(tensors, plain)
    if name not in calibration.input_means:
        raise BitPolicyError(
            f"layer {name}: bias correction needs its mean input, which the calibration does not have; run the search "
            "again to measure it"
        )
    packed = packed_weight(layer, choice.format, tensors)
    shift = mean_error(layer, weight, packed, calibration.input_means[name])
    corrected = corrected_bias(plain, shift, weight.dtype)
    return QuantizedLayer(tensors, plain if corrected is None else corrected, left_as_it_was=corrected is None)


def mean_error(layer: Quantizable, weight: torch.Tensor, packed: PackedWeight, patch: torch.Tensor) -> torch.Tensor:
    """What corrects the layer's bias: minus the mean error of its output, float32, shape (out).

    It is computed a few rows at a time, so that no float64 copy of a layer exists.

    Args:
        layer: gives the kind of layer; its own tensors are not read.
        weight: in the storage dtype.
        packed: the same weight as it is stored.
        patch: E[x] from `mean_patch`.
    """
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    if groups > 1:
        return bias_shift(layer, unpacked(packed, torch.float32) - weight.float(), patch)
    shift = torch.empty(weight.shape[0], device=weight.device)

    def work(rows: slice) -> None:
        delta = unpacked(packed.rows(rows), torch.float32) - weight[rows].float()
        shift[rows] = bias_shift(layer, delta, patch)

    each_chunk(work, weight.shape, weight.device)
    return shift


def stored_weight(name: str, weight: torch.Tensor, choice: Choice, calibration: Calibration) -> dict[str, torch.Tensor]:
    """The packed tensors of one layer's weight: from the calibration if it has them, otherwise from the quantizer.

    Raises:
        BitPolicyError: the weight is not finite, its shape does not fit the format, or the tensors in the calibration
            are missing or have another dtype or shape.
    """
    format = choice.format
    if not format.fits(weight.shape):
        raise BitPolicyError(
            f"layer {name}: {format.name} does not fit its shape {tuple(weight.shape)}; give it another format"
        )
    specs = format.tensors(weight.shape, weight.dtype)
    kept = {suffix: calibration.rounded.get(RoundedKey.of(name, choice, suffix)) for suffix in specs}
    if all(tensor is not None for tensor in kept.values()):
        found = {suffix: tensor.to(weight.device) for suffix, tensor in kept.items() if tensor is not None}
        if any((t.dtype, tuple(t.shape)) != (specs[s].dtype, specs[s].shape) for s, t in found.items()):
            raise BitPolicyError(
                f"layer {name}: its tensors in the calibration do not have the dtypes and shapes of {format.name}; use "
                "the calibration.safetensors that was written with this policy"
            )
        return found
    if choice.quantizer in HESSIANS:
        raise BitPolicyError(
            f"layer {name} was rounded by {choice.quantizer}, but the calibration does not have the result; keep "
            "calibration.safetensors next to policy.yaml, or set quantizer: rtn"
        )
    try:
        if isinstance(format, GridFormat):
            return quantize_data_free(choice.quantizer, format, weight)
        return format.quantize(weight)
    except BitPolicyError as error:
        raise type(error)(f"layer {name}: {error}") from error


@contextmanager
def quantized(
    model: HasModules,
    choices: Mapping[str, Choice],
    *,
    quantization: Quantization,
) -> Iterator[None]:
    """Make a model compute as if it were packed while the block runs, and restore it afterwards.

    Its layers use the weights and biases that `choices` would store, and round their inputs as packed layers do under
    the compute of `quantization`.

    Args:
        model: a target or one of its models.
    """
    compute = quantization.compute
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    with ExitStack() as undone:
        undone.callback(_restore, before)
        for name, layer in quantizable_layers(model):
            choice = choices.get(name)
            if choice is None or not choice.format.packed:
                continue
            stored = quantize_layer(name, layer, choice, quantization=quantization)
            packed = packed_weight(layer, choice.format, stored.tensors)
            weight = multiplied_weight(packed, layer.weight.dtype, compute)
            before.append((layer.weight, layer.weight.data))
            layer.weight.data = weight
            if layer.bias is not None and stored.bias is not None:
                before.append((layer.bias, layer.bias.data))
                layer.bias.data = stored.bias.to(layer.bias.dtype)
            if rounds_inputs(layer, choice.format, compute):
                undone.callback(round_inputs(layer, compute).remove)
        yield


def _restore(before: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for parameter, data in before:
        parameter.data = data


def pack(model: nn.Module, choices: Mapping[str, Choice], *, quantization: Quantization) -> None:
    """Replace the layers of `model` with packed ones, in place."""
    for name, layer in list(quantizable_layers(model)):
        choice = choices.get(name)
        if choice is None or not choice.format.packed:
            continue
        stored = quantize_layer(name, layer, choice, quantization=quantization)
        if layer.bias is not None and stored.bias is not None:
            layer.bias.data = stored.bias.to(layer.bias.dtype)
        replace_layer(model, name, pack_layer(layer, choice.format, stored.tensors))


def to_storage(model: nn.Module | Target, storage: torch.dtype) -> None:
    """Round every float of a model or a target to a value that the storage dtype can hold, in place.

    The reference is the model rounded in this way.

    Raises:
        BitPolicyError: a value is beyond the storage dtype's range.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != storage:
            tensor.copy_(as_stored(name, tensor, storage))


def as_stored(name: str, tensor: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """A tensor as it is stored: floats in the storage dtype, everything else as it is.

    Raises:
        BitPolicyError: a finite value is beyond the storage dtype's range. NaN and Inf are kept.
    """
    if not tensor.is_floating_point() or tensor.dtype == storage:
        return tensor
    found = tensor.to(storage)
    if not is_finite(found) and not torch.isfinite(found[torch.isfinite(tensor)]).all():
        raise BitPolicyError(
            f"{name} has values that {storage} cannot hold; save the pipeline in bfloat16, which has a wider range "
            "(pipe.to(torch.bfloat16).save_pretrained(FOLDER)), and give that folder"
        )
    return found
