"""A file that takes one tensor at a time, each at its own place, so that memory does not grow with the model."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import BinaryIO, Self

import torch

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.identity import tensor_bytes


class TensorWriter:
    """The tensors in `specs`, each written once by `write`, in any order.

    Args:
        specs: dtype and shape of every tensor.
        starts: where each begins, in bytes.
        file: open for writing; closed with this writer.

    Raises:
        ValueError: on closing, if a tensor was not written; on writing, if a tensor does not match its spec.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], starts: Mapping[str, int], file: BinaryIO) -> None:
        self._specs, self._starts, self._file = specs, starts, file
        self._missing = set(specs)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._written(name, tensor)

    def _written(self, name: str, tensor: torch.Tensor) -> memoryview:
        """Write a tensor; returns its bytes."""
        spec = self._specs[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, needed {spec.dtype} {spec.shape}")
        self._file.seek(self._starts[name])
        data = tensor_bytes(tensor)
        self._file.write(data)
        self._missing.discard(name)
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, e.g. {min(self._missing)}")
