"""Where the tensors of a model are read from, one at a time: a module in memory, or safetensors files
(`bitpolicy.policies.storage.file_source`).

Exporting sees only names, shapes, dtypes and one tensor at a time, so both roads write the same bytes.
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
        """Name -> dtype and shape, of every tensor there is."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored, not to be written to."""


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
    """Another source, none of whose tensors may change between two readings.

    Args:
        storage: the dtype that counts.
        first: what was read of it before, and may have been cast to another dtype since; None is what is read first.
    """

    def __init__(self, source: TensorSource, storage: torch.dtype, first: TensorSource | None = None) -> None:
        self._source, self._storage, self._first = source, storage, first
        self._checksums: dict[str, str] = {}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._source.specs

    def read(self, name: str) -> torch.Tensor:
        """
        Raises:
            BitPolicyError: it is not as it was.
        """
        tensor = self._source.read(name)
        found = self._checksum(name, tensor)
        if name not in self._checksums:
            self._checksums[name] = found if self._first is None else self._checksum(name, self._first.read(name))
        if found != self._checksums[name]:
            raise BitPolicyError(
                f"the model's files have changed while they were used: {name} is another than it was; run the command "
                "again, and what still holds is kept"
            )
        return tensor

    def _checksum(self, name: str, tensor: torch.Tensor) -> str:
        return checksum(tensor_bytes(as_stored(name, tensor, self._storage)))


class _Joined:
    """The tensors of several components; their names begin with their component's."""

    def __init__(self, parts: Mapping[str, TensorSource]) -> None:
        self._parts = parts

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {f"{part}.{name}": spec for part, source in self._parts.items() for name, spec in source.specs.items()}

    def read(self, name: str) -> torch.Tensor:
        part, _, rest = name.partition(".")
        return self._parts[part].read(rest)


def joined(sources: Mapping[str, TensorSource]) -> TensorSource:
    """The tensors of a target by the names that they have in it.

    Args:
        sources: component -> its tensors.
    """
    return next(iter(sources.values())) if len(sources) == 1 else _Joined(sources)


def source_hashes(sources: Mapping[str, TensorSource], storage: torch.dtype) -> dict[str, str]:
    """Component -> what `bitpolicy.policies.identity.weights_hash` gives for its tensors.

    Raises:
        BitPolicyError: a value is beyond the storage dtype's range.
    """
    return {name: source_hash(source, storage) for name, source in sources.items()}


def source_hash(source: TensorSource, storage: torch.dtype) -> str:
    """The same of one component."""
    return tensors_hash(((name, as_stored(name, source.read(name), storage)) for name in sorted(source.specs)), storage)
