"""The interface of a storage format: its parameters, and the arithmetic of its bytes.

A format turns a weight of shape (out, in/groups, *kernel) into named tensors and back. Their names are appended to the
layer's name in a checkpoint (`<layer>.weight_packed`). `tensors(shape)` gives their dtypes and shapes in advance, so
the size of a file is known exactly before anything is quantized.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

Shape = Sequence[int]


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor: its dtype and its shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def stored(cls, tensor: torch.Tensor, storage_dtype: torch.dtype) -> TensorSpec:
        """How a tensor that no format touches is stored: floats in the storage dtype, everything else as it is."""
        return cls(storage_dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


@dataclass(frozen=True)
class Format(ABC):
    """A way to store one weight.

    Attributes:
        name: what users write on the command line and in policy files, e.g. "int4".
    """

    name: str

    packed = True
    """False if the layer stays an ordinary torch module."""

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """What a policy file records about this format, as plain YAML values."""

    @abstractmethod
    def tensors(self, shape: Shape, storage_dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The tensors that store a weight of this shape, by name suffix, in file order."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Store `weight`, shape (out, in/groups, *kernel), any float dtype.

        Raises:
            FormatError: the weight has NaN or infinite values.
        """

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """The weight that `tensors` represent, contiguous, computed in float32 and rounded once to `dtype`."""

    def fits(self, shape: Shape) -> bool:
        """Whether this format can store a weight of this shape."""
        return True

    def nbytes(self, shape: Shape, storage_dtype: torch.dtype) -> int:
        """Bytes of the stored tensors, including scales, zero points and padding."""
        return sum(spec.nbytes for spec in self.tensors(shape, storage_dtype).values())
