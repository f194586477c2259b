"""Where the tensors of a model are read from, one at a time: a module in memory, or safetensors files.

Exporting sees only names, shapes, dtypes and one tensor at a time, so both roads write the same bytes. A file is
mapped into memory by safetensors; pages that were read stay mapped until it is closed, so it is opened anew every
`_MAPPED` bytes, and reading takes no more memory than that and a tensor, however large the file is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.format import TensorSpec
from bitpolicy.policies.accounting import tensors_hash
from bitpolicy.policies.apply import as_stored
from bitpolicy.policies.safetensors_writer import NAMED_DTYPES

_MAPPED = 64 * 2**20  # bytes read from a file before it is closed


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


class FileSource:
    """The tensors of some safetensors files; of a name in several, the last file's.

    Raises:
        BitPolicyError: a file is missing or damaged, or has tensors of a dtype that is not read here.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._places: dict[str, Path] = {}
        self._specs: dict[str, TensorSpec] = {}
        for path in paths:
            found = header(path)
            self._specs |= found
            self._places |= dict.fromkeys(found, path)
        self._open: tuple[Path, Any] | None = None
        self._mapped = 0

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> torch.Tensor:
        path = self._places[name]
        if self._open is None or self._open[0] != path or self._mapped > _MAPPED:
            self._open, self._mapped = (path, safe_open(path, "pt")), 0
        self._mapped += self._specs[name].nbytes
        return self._open[1].get_tensor(name)


class JoinedSource:
    """Several models as one; the names of tensors begin with their model's."""

    def __init__(self, parts: Mapping[str, TensorSource]) -> None:
        self._parts = parts

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {f"{part}.{name}": spec for part, source in self._parts.items() for name, spec in source.specs.items()}

    def read(self, name: str) -> torch.Tensor:
        part, _, rest = name.partition(".")
        return self._parts[part].read(rest)


def source_hash(sources: Mapping[str, TensorSource], storage: torch.dtype) -> str:
    """`bitpolicy.policies.accounting.weights_hash` of a denoiser, or of several as one.

    Raises:
        BitPolicyError: a value is beyond the storage dtype's range.
    """
    source = next(iter(sources.values())) if len(sources) == 1 else JoinedSource(sources)
    return tensors_hash(((name, as_stored(name, source.read(name), storage)) for name in sorted(source.specs)), storage)


def header(path: Path) -> dict[str, TensorSpec]:
    """What a safetensors file holds, read from its header alone.

    Raises:
        BitPolicyError: it is missing or damaged, or has tensors of a dtype that is not read here.
    """
    try:
        with safe_open(path, "pt"):  # its header is sound, and it is as long as that says
            pass
        with path.open("rb") as file:
            entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (OSError, SafetensorError) as error:
        raise BitPolicyError(
            f"cannot read {path}: {error}; download it again (a git-lfs pointer is no weights)"
        ) from error
    entries.pop("__metadata__", None)
    unknown = {entry["dtype"] for entry in entries.values()} - NAMED_DTYPES.keys()
    if unknown:
        raise BitPolicyError(f"{path} has tensors of dtype {min(unknown)}; read are {', '.join(sorted(NAMED_DTYPES))}")
    return {name: TensorSpec(NAMED_DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in entries.items()}
