"""Sets what the packed layers of a model may round, and reports the memory that they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from bitpolicy.kernels.dispatch import prepared_bytes
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.kernel import Compute, parse_compute
from bitpolicy.kernels.layers import packed_layers


def set_compute(model: Any, compute: str | Compute | None, low_memory: bool | None = None) -> list[str]:
    """Set what packed layers may round in addition to their weights (activation quantization).

    Args:
        model: a pipeline, a module with packed layers, or several modules by name.
        compute: "exact" (nothing), "float" (nothing, but sums may be taken in another order), "int8" (inputs, to 8
            bits: faster where the processor multiplies integers, with some loss), "fp8" (inputs of layers in `fp8` and
            `fp8-tensor`, to float8), "mxfp8" (of those in `mxfp8` and `mxfp4`, to float8 in blocks) or "nvfp4" (of
            those in `nvfp4`, to 4 bits in blocks); None leaves the setting unchanged.
        low_memory: kernels may keep no layouts of their own, which costs time; None leaves the setting unchanged.

    Returns:
        Names of the layers that now compute this way; none under "exact". Short and grouped layers never round their
            inputs, and under the last three modes neither do layers in other formats. They compute as under "float".

    Raises:
        BitPolicyError: there is no such mode, or the model has no packed layer.
    """
    wanted = None if compute is None else parse_compute(compute)
    parts = {"": model} if isinstance(model, nn.Module) else dict(getattr(model, "components", model))
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    layers = {f"{part}.{name}".strip("."): x for part, module in modules.items() for name, x in packed_layers(module)}
    if not layers:
        raise BitPolicyError(f"{type(model).__name__} has no packed layers; load a checkpoint exported by bitpolicy")
    for layer in layers.values():
        layer.compute = layer.compute if wanted is None else wanted
        layer.low_memory = layer.low_memory if low_memory is None else low_memory
    return [name for name, layer in layers.items() if layer.effective_compute is layer.compute is not Compute.EXACT]


@dataclass(frozen=True)
class Resident:
    """Bytes of a model in memory.

    Attributes:
        stored: its parameters and buffers, with packed tensors in their storage layout.
        layouts: the layouts that kernels made from packed weights and keep.
    """

    stored: int
    layouts: int


def resident_bytes(model: nn.Module) -> Resident:
    """The bytes that a model with packed layers holds between calls, without scratch memory freed after each call."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    layouts = sum(prepared_bytes(next(iter(layer.packed_tensors().values()))) for _, layer in packed_layers(model))
    return Resident(sum(t.nbytes for t in tensors.values()), layouts)
