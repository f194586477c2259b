"""The exact number of tensor bytes in a policy's checkpoint, known before anything is written.

The total counts every tensor of the exported components: the codes, scales, zero points and padding of each packed
layer, and everything that is not packed (biases, norms, embeddings, buffers) in the storage dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitpolicy.kernels.formats.format import Format, TensorSpec
from bitpolicy.kernels.formats.named import FP16
from bitpolicy.policies.target import Target


@dataclass(frozen=True)
class ByteAccount:
    """The sizes of one component, or of several together.

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
    def of(cls, target: Target, storage_dtype: torch.dtype) -> ByteAccount:
        shapes = {name: tuple(layer.weight.shape) for name, layer in target.layers.items()}
        weights = {f"{name}.weight" for name in shapes}
        others = (tensor for name, tensor in target.stored_tensors().items() if name not in weights)
        fixed = sum(TensorSpec.stored(tensor, storage_dtype).nbytes for tensor in others)
        return cls(storage_dtype, shapes, fixed, sum(p.numel() for p in target.parameters()))

    def layer(self, name: str, format: Format) -> int:
        """Bytes of one layer's weight in `format`."""
        return format.nbytes(self.shapes[name], self.storage_dtype)

    def total(self, formats: Mapping[str, Format]) -> int:
        """Tensor bytes of the checkpoint, given the format of each layer."""
        return self.fixed + sum(self.layer(name, formats[name]) for name in self.shapes)

    @property
    def reference(self) -> int:
        """Tensor bytes with every layer in FP16: a budget of 100%."""
        return self.total(dict.fromkeys(self.shapes, FP16))
