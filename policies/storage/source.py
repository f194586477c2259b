"""Where the tensors of a model are read from, one at a time: a module in memory, or safetensors files
(`bitpolicy.policies.storage.file_source`).

Exporting sees only names, shapes, dtypes and one tensor at a time, so both roads write the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.accounting import tensors_hash
from bitpolicy.policies.apply import as_stored


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


class _Joined:
    """Several models as one; the names of tensors begin with their model's."""

    def __init__(self, parts: Mapping[str, TensorSource]) -> None:
        self._parts = parts

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {f"{part}.{name}": spec for part, source in self._parts.items() for name, spec in source.specs.items()}

    def read(self, name: str) -> torch.Tensor:
        part, _, rest = name.partition(".")
        return self._parts[part].read(rest)


def joined(sources: Mapping[str, TensorSource]) -> TensorSource:
    """The tensors of a denoiser, or of several as one, by component name."""
    return next(iter(sources.values())) if len(sources) == 1 else _Joined(sources)


def source_hash(sources: Mapping[str, TensorSource], storage: torch.dtype) -> str:
    """`bitpolicy.policies.accounting.weights_hash` of a denoiser, or of several as one.

    Raises:
        BitPolicyError: a value is beyond the storage dtype's range.
    """
    return ",".join(_hash(source, storage) for source in sources.values())


def _hash(source: TensorSource, storage: torch.dtype) -> str:
    return tensors_hash(((name, as_stored(name, source.read(name), storage)) for name in sorted(source.specs)), storage)
