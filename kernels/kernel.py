"""The interface of a kernel: code that multiplies an input with one packed weight.

    y = x W^T + b    for a linear layer,    y = x * W + b    for a convolution

A kernel says which calls it cannot take, prepares its own layout of the weight once, and multiplies. Its `Compute` says
what it may round. Kernels with the same compute mode give the same result, up to the order of sums where that is
stated. `bitpolicy.kernels.dispatch` decides which kernel serves a call.
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
    """What a product may round in addition to the weight. INT8 and FP8 are activation quantization.

    EXACT: nothing; bit for bit the result of an ordinary layer with the dequantized weight.
    FLOAT: nothing, but sums may run in another order.
    INT8: inputs, to 8 bits (`bitpolicy.kernels.compute.int8`); sums are of integers.
    FP8: inputs of `fp8` layers, to float8 (`bitpolicy.kernels.compute.fp8`); other layers compute as under FLOAT.
    """

    EXACT = "exact"
    FLOAT = "float"
    INT8 = "int8"
    FP8 = "fp8"

    @property
    def rounds_inputs(self) -> bool:
        return self in (Compute.INT8, Compute.FP8)


def parse_compute(name: str) -> Compute:
    """The compute mode called `name`.

    Raises:
        BitPolicyError: there is no such mode.
    """
    try:
        return Compute(name.strip().lower())
    except ValueError:
        raise BitPolicyError(f"unknown compute {name!r}; write any of {', '.join(Compute)}") from None


@dataclass(frozen=True)
class Geometry:
    """How a convolution slides over its zero-padded input, with one number per dimension.

    Attributes:
        padding: on each side.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


_kinds: dict[tuple[object, ...], int] = {}
_numbers = count()


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in its storage layout.

    Attributes:
        format: how it is stored.
        shape: (out, in/groups, *kernel).
        tensors: the stored ones by suffix, as `format.tensors(shape)` specifies.
        geometry: of the convolution; None for a linear layer.
        low_memory: kernels may not make layouts that outlive a call.
    """

    format: Format
    shape: tuple[int, ...]
    tensors: Mapping[str, torch.Tensor]
    geometry: Geometry | None = None
    low_memory: bool = False

    @property
    def row_length(self) -> int:
        """K: the number of weights in one output channel."""
        return prod(self.shape[1:])

    @cached_property
    def kind(self) -> int:
        """A number shared by all weights of one format, shape, geometry and memory setting: a fast lookup key."""
        return _kinds.setdefault((self.format, self.shape, self.geometry, self.low_memory), next(_numbers))

    @property
    def layer(self) -> str:
        """ "linear", "conv1d", "conv2d" or "conv3d"."""
        return "linear" if self.geometry is None else f"conv{len(self.geometry.stride)}d"

    def holding(self, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
        """This weight with other tensors. Takes a fifth of the time of making a new one and finding its `kind`."""
        other = object.__new__(PackedWeight)
        known = other.__dict__
        known.update(self.__dict__)
        known["tensors"] = tensors
        return other

    def rows(self, rows: slice) -> PackedWeight:
        """Some of the output channels, which are the first dimension of all stored tensors."""
        shape = (len(range(*rows.indices(self.shape[0]))), *self.shape[1:])
        tensors = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return PackedWeight(self.format, shape, tensors, self.geometry, self.low_memory)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, shape `shape`, contiguous, computed with plain torch code."""
        return self.format.dequantize(self.tensors, self.shape, dtype)


Prepared = Mapping[str, torch.Tensor]


class Kernel(ABC):
    """One way to multiply. A kernel is stateless: the caller keeps what it prepares and passes it in at every call.

    Attributes:
        name: what users write to force it.
        compute: what it rounds.
        settled: for every shape it does less work than the kernels below it in the table, so no timing is needed.
        thrifty: it needs less memory than others with its compute mode, and is chosen if it is about as fast.
    """

    name: ClassVar[str]
    compute: ClassVar[Compute]
    settled: ClassVar[bool] = False
    thrifty: ClassVar[bool] = False

    @abstractmethod
    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        """Why it does not take this call, in a few words; None if it does. Reads only shapes and dtypes."""

    def prepare(self, weight: PackedWeight, dtype: torch.dtype) -> Prepared:
        """Layouts of the weight that outlive the call. They are made once per input dtype and kept while the weight
        lives; none under `weight.low_memory`. Never stored in a file."""
        return {}

    def scratch(self, weight: PackedWeight, dtype: torch.dtype) -> int:
        """Bytes that stay reserved after a call, for reuse by the next call of any layer."""
        return 0

    @abstractmethod
    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, prepared: Prepared
    ) -> torch.Tensor:
        """The product, in the dtype, device and memory format of the result of torch's own layer.

        Args:
            x: float32, float16 or bfloat16, with any strides; (..., in) for a linear layer, (B, in, *spatial) for a
                convolution. Any size may be 0.
            bias: shape (out), in the dtype of `x`.
        """


def recorded(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether autograd records the product, and so keeps its weight until the backward pass."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
