"""bitpolicy.json: the files of an exported folder, each with its length and SHA-256. It is written last.

A loader notices little of what is wrong with a folder: tensors missing from a text encoder's file are initialized at
random, and a tokenizer or a VAE of another model loads as well. So everything that `from_pretrained` reads is listed:
the files of all components, model_index.json and the calibration. policy.yaml and README.md, which people edit, are
not.

Lengths are always compared, and unexpected files are always refused. Files of up to `SMALL` bytes are hashed every
time, larger ones only on request. (Packed tensors have checksums of their own, which are always compared.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.storage.atomic import write_text
from bitpolicy.policies.storage.calibration_file import FILE as CALIBRATION

FILE = "bitpolicy.json"
SMALL = 32 * 2**20
_VERSION = 1
_LISTED = ("model_index.json", CALIBRATION)
_READ = (".safetensors", ".json", ".txt", ".model", ".jinja", ".py", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
_REMEDY = "download or export it again (if you changed it on purpose, delete bitpolicy.json)"


def write_manifest(folder: Path) -> None:
    """List what is in an exported folder."""
    files = {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in _files(folder)}
    write_text(folder / FILE, json.dumps({"version": _VERSION, "files": files}, indent=1) + "\n")


def verify(folder: Path, everything: bool = False) -> None:
    """Compare a folder with its manifest. A folder without one, such as a pipeline that was saved again, passes.

    Args:
        everything: whether to hash large files, too.

    Raises:
        BitPolicyError: a file is missing, unexpected, or different from the one that was written.
    """
    if not (folder / FILE).is_file():
        return
    listed, found = _listed(folder / FILE), dict(_files(folder))
    for name in sorted(listed.keys() | found.keys()):
        if name not in listed:
            if Path(name).suffix in _READ:
                raise BitPolicyError(f"{found[name]} is not part of this checkpoint: {FILE} lacks it; {_REMEDY}")
            continue
        if name not in found:
            raise BitPolicyError(f"{folder / name} is missing; {_REMEDY}")
        _require(found[name], *listed[name], everything)


def _require(path: Path, nbytes: int, sha256: str, everything: bool) -> None:
    found = path.stat().st_size
    if found != nbytes:
        raise BitPolicyError(f"{path} has {found:,} bytes, but was written with {nbytes:,}; {_REMEDY}")
    if (everything or nbytes <= SMALL) and _sha256(path) != sha256:
        raise BitPolicyError(f"{path} has changed since it was written: its SHA-256 differs; {_REMEDY}")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of the components, by their paths in the folder, and those in `_LISTED`."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and (len(name.parts) > 1 or name.name in _LISTED):
            yield name.as_posix(), path


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BitPolicyError(f"cannot read {path}: {error.strerror}; make it a file that this user can read") from error


def _listed(path: Path) -> dict[str, tuple[int, str]]:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        version, files = found["version"], found["files"]
        listed = {str(name): (int(about["bytes"]), str(about["sha256"])) for name, about in files.items()}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise BitPolicyError(f"cannot read {path}, which lists the files; download or export it again") from error
    if version != _VERSION:
        raise BitPolicyError(f"{path} has version {version!r}, needed {_VERSION}; install a newer bitpolicy")
    return listed
