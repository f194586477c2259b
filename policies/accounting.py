"""Exact bytes: what a policy's checkpoint weighs, known before anything is written.

The total counts every tensor of the exported components: packed codes, scales, zero points and padding of each layer,
and all that no format touches (biases, norms, embeddings, buffers) in the storage dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from bitpolicy.kernels.formats.format import Format, TensorSpec
from bitpolicy.kernels.formats.named import FP16
from bitpolicy.kernels.layers import quantizable_layers


@dataclass(frozen=True)
class ByteAccount:
    """The sizes of one component, or of several as one.

    Attributes:
        storage_dtype: dtype of everything that is not packed.
        shapes: weight shape of each quantizable layer.
        fixed: bytes of all other tensors.
        parameters: number of parameters, for budgets in bits per parameter.
    """

    storage_dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    fixed: int
    parameters: int

    @classmethod
    def of(cls, model: nn.Module, storage_dtype: torch.dtype) -> ByteAccount:
        shapes = {name: tuple(layer.weight.shape) for name, layer in quantizable_layers(model)}
        others = {
            n: t
            for n, t in stored_tensors(model).items()
            if n.removesuffix(".weight") not in shapes or not n.endswith(".weight")
        }
        fixed = sum(stored_spec(tensor, storage_dtype).nbytes for tensor in others.values())
        return cls(storage_dtype, shapes, fixed, sum(p.numel() for p in model.parameters()))

    def layer(self, name: str, format: Format) -> int:
        """Bytes of one layer's weight in `format`."""
        return format.nbytes(self.shapes[name], self.storage_dtype)

    def total(self, formats: Mapping[str, Format]) -> int:
        """Tensor bytes of the checkpoint in which each layer has the format given to it."""
        return self.fixed + sum(self.layer(name, formats[name]) for name in self.shapes)

    @property
    def reference(self) -> int:
        """Tensor bytes with every layer at FP16: what `%` is relative to."""
        return self.total(dict.fromkeys(self.shapes, FP16))


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as it is written: without the second names of tied weights in models of transformers, whose own
    `save_pretrained` leaves them out, and whose `from_pretrained` ties them again."""
    if isinstance(model, nn.ModuleDict):
        return {f"{name}.{key}": t for name, part in model.items() for key, t in stored_tensors(part).items()}
    state = model.state_dict()
    if not isinstance(model, PreTrainedModel):
        return state
    return {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}


def stored_spec(tensor: torch.Tensor, storage_dtype: torch.dtype) -> TensorSpec:
    """How a tensor that no format touches is stored: floats in the storage dtype, everything else as it is."""
    return TensorSpec(storage_dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
