"""Finished pieces of a probe on disk, so that an interrupted one goes on where it stopped.

Each piece is one small safetensors file with a checksum of its tensors, written aside and renamed, and never changed
again. The folder is named by a hash of everything the numbers depend on: another model, prompt, seed, scheduler or
format is another folder, and old pieces are never mistaken for new. Several processes may share a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.identity import tensors_digest
from bitpolicy.policies.storage.atomic import written_aside

Piece = Mapping[str, torch.Tensor]


def settings_key(settings: Mapping[str, Any]) -> str:
    """A short hash of JSON-like settings, the same for the same settings in any order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Records:
    """The pieces under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> dict[str, torch.Tensor] | None:
        """The finished piece, or None; a file that does not read, or not as it was written, counts as not there."""
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():  # a pipe would be waited for
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
                whole = (file.metadata() or {}).get("sha256") == tensors_digest(sorted(tensors.items()))
        except (OSError, SafetensorError):
            return None
        return tensors if whole else None

    def put(self, name: str, tensors: Piece) -> None:
        """
        Raises:
            BitPolicyError: the folder was removed since it was opened, and all earlier pieces with it.
        """
        if not self._folder.is_dir():
            raise BitPolicyError(f"{self._folder} was removed while it was being written; run the command again")
        kept = {key: tensor.contiguous() for key, tensor in tensors.items()}
        with written_aside(self._folder / f"{name}.safetensors") as aside:
            save_file(kept, aside, metadata={"sha256": tensors_digest(sorted(kept.items()))})
