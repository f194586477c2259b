"""Tensors in safetensors files, read one at a time.

safetensors maps a file into memory, and pages that were read stay mapped until the file is closed. So it is reopened
every `_MAPPED` bytes, and reading takes no more memory than that plus one tensor, however large the file is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.storage.safetensors_writer import NAMED_DTYPES

_POINTER = b"version https://git-lfs"
_MAPPED = 64 * 2**20  # bytes read from a file before it is closed


class FileSource:
    """The tensors of some safetensors files. If several files have a tensor of one name, the last file's is used.

    Raises:
        BitPolicyError: a file is missing or damaged, or has tensors of an unsupported dtype.
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


class FileTensors(Mapping[str, torch.Tensor]):
    """The tensors of one file by name, each read on access and not kept.

    Raises:
        BitPolicyError: as for `FileSource`.
    """

    def __init__(self, path: Path) -> None:
        self._source = FileSource([path])

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._source.specs:
            raise KeyError(name)
        return self._source.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._source.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.specs)

    def __len__(self) -> int:
        return len(self._source.specs)


def header(path: Path) -> dict[str, TensorSpec]:
    """The dtypes and shapes of the tensors in a safetensors file, read from its header alone.

    Raises:
        BitPolicyError: the file is missing, unreadable or damaged, or has tensors of an unsupported dtype.
    """
    try:
        with open_tensors(path):  # checks the header, and the length of the file against it
            pass
        with path.open("rb") as file:
            entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except FileNotFoundError as error:
        raise BitPolicyError(f"{path} is missing; download it again") from error
    except OSError as error:
        why = error.strerror or str(error)
        raise BitPolicyError(f"cannot read {path}: {why}; make it a file that this user can read") from error
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                text = f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull`, or download it again"
                raise BitPolicyError(text) from error
        raise BitPolicyError(f"cannot read {path}, which is damaged ({error}); download it again") from error
    entries.pop("__metadata__", None)
    unknown = {entry["dtype"] for entry in entries.values()} - NAMED_DTYPES.keys()
    if unknown:
        raise BitPolicyError(
            f"{path} has tensors of dtype {min(unknown)}; supported dtypes are {', '.join(sorted(NAMED_DTYPES))}"
        )
    return {name: TensorSpec(NAMED_DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in entries.items()}


def require_plain_file(path: Path) -> None:
    """Refuse anything but a regular file. Reading a pipe, for example, could block.

    Raises:
        OSError: something else is there.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is not a regular file")


def open_tensors(path: Path) -> Any:
    """Like `safetensors.safe_open`, but with the real error for a file that cannot be opened instead of "missing".

    Raises:
        OSError: the file cannot be opened.
        SafetensorError: it is damaged.
    """
    require_plain_file(path)
    with path.open("rb"):
        return safe_open(path, "pt")
