"""A calibration too large for memory: E[x] of every layer is held, what quantizers made of it lies on disk.

There is one safetensors file a layer, which holds every candidate and a checksum. It is written tensor by tensor, aside
and renamed, and never changed again; what is read from it is mapped into memory by the system, not copied. So what is
resident does not grow with the number of formats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.identity import tensor_bytes
from bitpolicy.policies.storage.atomic import written_aside
from bitpolicy.policies.storage.safetensors_writer import SafetensorsWriter

_CHECKSUM = "checksum"  # of the other tensors; their names have slashes
_SPEC = TensorSpec(torch.uint8, (32,))


class KeptCalibration(Mapping[str, torch.Tensor]):
    """E[x] by layer name, and packed tensors by `rounded_key`, of layers whose files `write_rounded` wrote.

    Args:
        means: layer name -> E[x].
        files: layer name -> its file.
    """

    def __init__(self, means: Mapping[str, torch.Tensor], files: Mapping[str, Path]) -> None:
        self._means, self._files = means, files
        self._open: tuple[str, Any, frozenset[str]] = "", None, frozenset()

    def __getitem__(self, key: str) -> torch.Tensor:
        if "/" not in key:
            return self._means[key]
        file, keys = self._file(key.partition("/")[0])
        if key not in keys:
            raise KeyError(key)
        return file.get_tensor(key)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str) or "/" not in key:
            return key in self._means
        return key in self._file(key.partition("/")[0])[1]

    def __iter__(self) -> Iterator[str]:
        yield from self._means
        for layer in self._files:
            yield from sorted(self._file(layer)[1])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _file(self, layer: str) -> tuple[Any, frozenset[str]]:
        """The layer's file and the keys it has; that of the last layer asked for is open."""
        if self._open[0] != layer:
            if layer not in self._files:
                return None, frozenset()
            file = safe_open(self._files[layer], "pt")
            self._open = layer, file, frozenset(file.keys()) - {_CHECKSUM}
        return self._open[1:]


def write_rounded(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write one layer's file.

    Args:
        specs: what `tensors` yields, in any order; each is written before the next is asked for.
    """
    digests: dict[str, bytes] = {}
    with written_aside(path) as aside, SafetensorsWriter(aside, {**specs, _CHECKSUM: _SPEC}) as file:
        for key, tensor in tensors:
            file.write(key, tensor)
            digests[key] = _digest(tensor)
        file.write(_CHECKSUM, _checksum(digests))


def is_whole(path: Path, keys: Iterable[str]) -> bool:
    """Whether the file is there as it was written, and holds `keys`."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            found = set(file.keys()) - {_CHECKSUM}
            checksum = _checksum({key: _digest(file.get_tensor(key)) for key in found})
            return found == set(keys) and torch.equal(file.get_tensor(_CHECKSUM), checksum)
    except (OSError, SafetensorError):
        return False


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor_bytes(tensor)).digest()


def _checksum(digests: Mapping[str, bytes]) -> torch.Tensor:
    whole = hashlib.sha256(b"".join(key.encode() + digests[key] for key in sorted(digests)))
    return torch.tensor(list(whole.digest()), dtype=torch.uint8)
