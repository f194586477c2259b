"""Rounded weights on disk, because those of all candidates together do not fit in memory.

Each layer has one safetensors file with all its candidates and a checksum. The file is written tensor by tensor under a
temporary name, renamed, and never changed again. The system maps tensors from it into memory instead of copying them,
so resident memory does not grow with the number of formats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.calibration import RoundedKey
from bitpolicy.policies.identity import tensor_bytes
from bitpolicy.policies.storage.atomic import written_aside
from bitpolicy.policies.storage.safetensors_writer import SafetensorsWriter

_CHECKSUM = "checksum"  # of the other tensors, whose names all contain slashes
_SPEC = TensorSpec(torch.uint8, (32,))


class KeptRounding(Mapping[RoundedKey, torch.Tensor]):
    """The rounded weights in files that `write_rounded` wrote.

    Args:
        files: layer name -> its file.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: tuple[str, Any, frozenset[str]] = "", None, frozenset()

    def __getitem__(self, key: RoundedKey) -> torch.Tensor:
        file, names = self._file(key.layer)
        if str(key) not in names:
            raise KeyError(key)
        return file.get_tensor(str(key))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, RoundedKey) and str(key) in self._file(key.layer)[1]

    def __iter__(self) -> Iterator[RoundedKey]:
        for layer in self._files:
            names = sorted(self._file(layer)[1])
            yield from (key for name in names if (key := RoundedKey.read(name)) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _file(self, layer: str) -> tuple[Any, frozenset[str]]:
        """The layer's file and the names of its tensors. Only the file of the last requested layer stays open."""
        if self._open[0] != layer:
            if layer not in self._files:
                return None, frozenset()
            file = safe_open(self._files[layer], "pt")
            self._open = layer, file, frozenset(file.keys()) - {_CHECKSUM}
        return self._open[1:]


def write_rounded(
    path: Path, specs: Mapping[RoundedKey, TensorSpec], tensors: Iterable[tuple[RoundedKey, torch.Tensor]]
) -> None:
    """Write one layer's file.

    Args:
        specs: the specs of all that `tensors` yields, in any order.
        tensors: each is written before the next is requested.
    """
    digests: dict[str, bytes] = {}
    named = {str(key): spec for key, spec in specs.items()}
    with written_aside(path) as aside, SafetensorsWriter(aside, {**named, _CHECKSUM: _SPEC}) as file:
        for key, tensor in tensors:
            file.write(str(key), tensor)
            digests[str(key)] = _digest(tensor)
        file.write(_CHECKSUM, _checksum(digests))


def is_whole(path: Path, keys: Iterable[RoundedKey]) -> bool:
    """Whether the file exists, is undamaged and holds exactly `keys`."""
    if not path.is_file():  # opening a named pipe would block
        return False
    try:
        with safe_open(path, "pt") as file:
            found = set(file.keys()) - {_CHECKSUM}
            checksum = _checksum({key: _digest(file.get_tensor(key)) for key in found})
            return found == set(map(str, keys)) and torch.equal(file.get_tensor(_CHECKSUM), checksum)
    except (OSError, SafetensorError):
        return False


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor_bytes(tensor)).digest()


def _checksum(digests: Mapping[str, bytes]) -> torch.Tensor:
    whole = hashlib.sha256(b"".join(key.encode() + digests[key] for key in sorted(digests)))
    return torch.tensor(list(whole.digest()), dtype=torch.uint8)
