"""Sources that a model's tensors are read from, one at a time: a module in memory, or safetensors files
(`bitpolicy.policies.storage.file_source`).

An export sees only names, shapes, dtypes and one tensor at a time, so both sources give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.apply import as_stored
from bitpolicy.policies.identity import checksum, tensor_bytes, tensors_hash


class TensorSource(Protocol):
    """The tensors of one model."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> dtype and shape of every tensor."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored; do not write to it."""


class ModuleSource:
    """The state dict of a module in memory."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = module.state_dict()

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()


class Unchanged:
    """A source that checks that no tensor of another source changes between two reads.

    Args:
        storage: the dtype in which tensors are compared.
        first: the tensors as they were read before, perhaps cast to another dtype since; None compares with the first
            read of each tensor.
    """

    def __init__(self, source: TensorSource, storage: torch.dtype, first: TensorSource | None = None) -> None:
        self._source, self._storage, self._first = source, storage, first
        self._checksums: dict[str, str] = {}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._source.specs

    def read(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            BitPolicyError: it has changed.
        """
        tensor = self._source.read(name)
        found = self._checksum(name, tensor)
        if name not in self._checksums:
            self._checksums[name] = found if self._first is None else self._checksum(name, self._first.read(name))
        if found != self._checksums[name]:
            raise BitPolicyError(
                f"the model's files changed while they were in use: {name} is not what it was; run the command again, "
                "which keeps everything that is still valid"
            )
        return tensor

    def _checksum(self, name: str, tensor: torch.Tensor) -> str:
        return checksum(tensor_bytes(as_stored(name, tensor, self._storage)))


class _Joined:
    """The tensors of several components, by names that begin with the component's."""

    def __init__(self, parts: Mapping[str, TensorSource]) -> None:
        self._parts = parts

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {f"{part}.{name}": spec for part, source in self._parts.items() for name, spec in source.specs.items()}

    def read(self, name: str) -> torch.Tensor:
        part, _, rest = name.partition(".")
        return self._parts[part].read(rest)


def joined(sources: Mapping[str, TensorSource]) -> TensorSource:
    """The tensors of a target, by their names in the target.

    Args:
        sources: component -> its tensors.
    """
    return next(iter(sources.values())) if len(sources) == 1 else _Joined(sources)


def source_hashes(sources: Mapping[str, TensorSource], storage: torch.dtype) -> dict[str, str]:
    """Component -> hash of its tensors, as `bitpolicy.policies.identity.weights_hash` gives it.

    Raises:
        BitPolicyError: a value is beyond the storage dtype's range.
    """
    return {name: source_hash(source, storage) for name, source in sources.items()}


def source_hash(source: TensorSource, storage: torch.dtype) -> str:
    """The hash of one component's tensors, as `bitpolicy.policies.identity.weights_hash` gives it."""
    return tensors_hash(((name, as_stored(name, source.read(name), storage)) for name in sorted(source.specs)), storage)
