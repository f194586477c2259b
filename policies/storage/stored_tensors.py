"""The tensors in the files of a checkpoint, checked against the model before any of them is used.

Loaders are lenient: diffusers leaves missing tensors on `meta`, transformers initializes them at random, both only warn
of unexpected tensors, and both cast scales of another dtype. A packed model must have exactly the bits that were
searched; anything else is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.identity import checksum, tensor_bytes
from bitpolicy.policies.storage.file_source import open_tensors
from bitpolicy.policies.storage.safetensors_writer import NAMED_DTYPES

_AGAIN = "download or export it again"
_DIGITS = 8  # of a checksum


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor, and its dtype and shape in the file's header."""

    file: Path
    name: str
    spec: TensorSpec


def stored_tensors(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Every tensor of some safetensors files, by name.

    Raises:
        BitPolicyError: a file is not a safetensors file, is damaged, or is outside the checkpoint's folder.
    """
    found: dict[str, StoredTensor] = {}
    for path in map(Path, files):
        if path.suffix != ".safetensors" or ".." in path.parts:
            raise BitPolicyError(
                f"{path} is not read: a packed model consists of safetensors files in one folder; {_AGAIN}"
            )
        for stored in _in_file(path):
            if stored.name in found:
                raise BitPolicyError(f"{path} and {found[stored.name].file} both hold {stored.name}; {_AGAIN}")
            found[stored.name] = stored
    return found


def _in_file(path: Path) -> Iterator[StoredTensor]:
    try:
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                yield StoredTensor(path, name, TensorSpec(NAMED_DTYPES[part.get_dtype()], tuple(part.get_shape())))
    except (OSError, SafetensorError) as error:
        raise BitPolicyError(f"cannot read {path}: {error}; {_AGAIN}") from error
    except KeyError as error:
        raise BitPolicyError(f"{path} holds a tensor of dtype {error}, which no packed model has; {_AGAIN}") from error


@contextmanager
def reader() -> Iterator[Callable[[StoredTensor], torch.Tensor]]:
    """A function that reads stored tensors, in any order. They are mapped, not copied, and each file is opened once."""
    with ExitStack() as files:
        opened = cache(lambda path: files.enter_context(safe_open(path, "pt")))
        yield lambda stored: opened(stored.file).get_tensor(stored.name)


def require_stored(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, TensorSpec],
    exact: Iterable[str],
    storage: torch.dtype,
) -> None:
    """Refuse files that do not hold exactly the tensors of a packed model.

    Args:
        expected: tensor name -> dtype and shape, according to the model and its formats.
        exact: names of packed tensors. The others may also be stored in float32 or in the storage dtype.
        storage: the storage dtype that the config names.

    Raises:
        BitPolicyError: a tensor is missing or unexpected, or has another shape or dtype.
    """
    packed = set(exact)
    _require_names(stored, expected, beyond=not packed)
    for name, spec in expected.items():
        found = stored[name].spec
        allowed = {spec.dtype} if name in packed or not spec.dtype.is_floating_point else {storage, torch.float32}
        _require(stored[name], "shape", found.shape, {spec.shape})
        _require(stored[name], "dtype", found.dtype, allowed)


def _require(stored: StoredTensor, what: str, found: object, allowed: Collection[object]) -> None:
    if found not in allowed:
        wanted = " or ".join(sorted(map(str, allowed)))
        raise BitPolicyError(
            f"{stored.file}: {stored.name} has {what} {found}, but the config says {wanted}; "
            f"the checkpoint is damaged: {_AGAIN}"
        )


def _require_names(stored: Mapping[str, StoredTensor], expected: Mapping[str, TensorSpec], beyond: bool) -> None:
    """Refuse files that lack tensors or, unless `beyond`, hold others. A ControlNet that borrows modules of the
    transformer, as Z-Image's does, is saved with them, and borrows them again."""
    where = next(iter(stored.values())).file.parent if stored else "the checkpoint"
    for names, verb in ((expected.keys() - stored.keys(), "lacks"), (stored.keys() - expected.keys(), "has")):
        if names and not (beyond and verb == "has"):
            unexpected = " that the model does not have" if verb == "has" else ""
            raise BitPolicyError(f"{where} {verb} {len(names)} tensors{unexpected}, e.g. {min(names)}; {_AGAIN}")


def require_checksums(stored: Mapping[str, StoredTensor], recorded: str) -> None:
    """Read all data once and compare it with the checksums recorded when it was written; without a record, do nothing.

    Args:
        recorded: 8 hex digits for each tensor, in the order of their names.

    Raises:
        BitPolicyError: a tensor has changed since it was written, or the record is for other tensors.
    """
    if not recorded:
        return
    if len(recorded) != _DIGITS * len(stored):
        raise BitPolicyError(f"the config has {len(recorded) // _DIGITS} checksums for {len(stored)} tensors; {_AGAIN}")
    with reader() as read:
        for i, (name, tensor) in enumerate(sorted(stored.items())):
            found, wanted = checksum(tensor_bytes(read(tensor))), recorded[_DIGITS * i : _DIGITS * (i + 1)]
            if found != wanted:
                raise BitPolicyError(
                    f"{tensor.file}: {name} has checksum {found}, but was written with {wanted}; the file is damaged: "
                    f"{_AGAIN}"
                )
