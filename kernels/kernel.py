"""What a kernel is: code that multiplies an input with one packed weight.

    y = x W^T + b    of a linear layer,    y = x * W + b    of a convolution

A kernel says which calls it cannot take, makes the layout of the weight that it wants once, and multiplies. What it may
round is said by its `Compute`; kernels of one compute give the same result, up to the order of sums where that is said.
Which kernel a call gets is decided in `bitpolicy.kernels.dispatch`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import count
from math import prod
from typing import ClassVar

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format


class Compute(StrEnum):
    """What a product may round beside the weight.

    EXACT: nothing; the bits of an ordinary layer that holds the dequantized weight.
    FLOAT: nothing, but sums may be taken in another order.
    INT8: inputs, to 8 bits (`bitpolicy.kernels.compute.int8`); sums are of integers.
    FP8: inputs, to float8 (`bitpolicy.kernels.compute.fp8`), of layers in `fp8`; all others as under FLOAT.
    """

    EXACT = "exact"
    FLOAT = "float"
    INT8 = "int8"
    FP8 = "fp8"

    @property
    def rounds_inputs(self) -> bool:
        return self in (Compute.INT8, Compute.FP8)


def parse_compute(name: str) -> Compute:
    """The compute called `name`.

    Raises:
        BitPolicyError: there is none.
    """
    try:
        return Compute(name.strip().lower())
    except ValueError:
        raise BitPolicyError(f"unknown compute {name!r}; write any of {', '.join(Compute)}") from None


@dataclass(frozen=True)
class Geometry:
    """How a convolution slides over its zero-padded input, one number a dimension.

    Attributes:
        padding: on either side.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


_kinds: dict[tuple[object, ...], int] = {}
_numbers = count()


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight as it lies in memory.

    Attributes:
        format: how it is stored.
        shape: (out, in/groups, *kernel).
        tensors: the stored ones by suffix, as `format.tensors(shape)` says.
        geometry: of the convolution; None for a linear layer.
        low_memory: no layout that outlives a call may be made of it.
    """

    format: Format
    shape: tuple[int, ...]
    tensors: Mapping[str, torch.Tensor]
    geometry: Geometry | None = None
    low_memory: bool = False

    @property
    def row_length(self) -> int:
        """K: how many weights one output channel has."""
        return prod(self.shape[1:])

    @cached_property
    def kind(self) -> int:
        """A number that all weights of this format, shape, geometry and memory share: quick to look up by."""
        return _kinds.setdefault((self.format, self.shape, self.geometry, self.low_memory), next(_numbers))

    @property
    def layer(self) -> str:
        """ "linear", "conv1d", "conv2d" or "conv3d"."""
        return "linear" if self.geometry is None else f"conv{len(self.geometry.stride)}d"

    def holding(self, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
        """Another weight of this kind, in a fifth of the time that making one and finding its `kind` takes."""
        other = object.__new__(PackedWeight)
        known = other.__dict__
        known.update(self.__dict__)
        known["tensors"] = tensors
        return other

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, shape `shape`, contiguous, by plain torch code."""
        return self.format.dequantize(self.tensors, self.shape, dtype)


Prepared = Mapping[str, torch.Tensor]


class Kernel(ABC):
    """One way to multiply. Stateless: what it makes of a weight is handed back to it at every call.

    Attributes:
        name: what people write to force it.
        compute: what it rounds.
        settled: it does less work than what stands below it in the table, whatever the shape, so nothing is tried.
        thrifty: it needs less memory than others of its compute, and is taken where it is about as fast as they.
    """

    name: ClassVar[str]
    compute: ClassVar[Compute]
    settled: ClassVar[bool] = False
    thrifty: ClassVar[bool] = False

    @abstractmethod
    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        """Why this call is none of its own, in a few words; None if it takes it. Reads shapes and dtypes only."""

    def prepare(self, weight: PackedWeight, dtype: torch.dtype) -> Prepared:
        """Layouts of the weight that outlive the call, made once for each dtype of input and kept while the weight
        lives; empty with `weight.low_memory`. Never stored in a file."""
        return {}

    def scratch(self, weight: PackedWeight, dtype: torch.dtype) -> int:
        """Bytes that stay reserved after a call, for the next one of any layer."""
        return 0

    @abstractmethod
    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        """The product, in the dtype, device and memory format that torch's own layer would give.

        Args:
            x: float32, float16 or bfloat16, of any strides; (..., in) for a linear layer, (B, in, *spatial) for a
                convolution. Any size may be 0.
            bias: shape (out), in the dtype of `x`.
        """


def recorded(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether autograd records a product, and keeps its weight until the backward pass."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
