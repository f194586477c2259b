"""Finished pieces of a probe on disk, so that an interrupted probe can resume.

Each piece is a small safetensors file with a checksum of its tensors. It is written under a temporary name, renamed,
and never changed again. The folder's name is a hash of everything the numbers depend on. Another model, prompt, seed,
scheduler or format gets another folder, so old pieces are never mistaken for new ones. Several processes may share a
folder.
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
    """A short hash of JSON-like settings. The order of the settings does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Records:
    """The finished pieces in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> dict[str, torch.Tensor] | None:
        """The finished piece, or None if it is missing, unreadable or damaged."""
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():  # opening a named pipe would block
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
                whole = (file.metadata() or {}).get("sha256") == tensors_digest(sorted(tensors.items()))
        except (OSError, SafetensorError):
            return None
        return tensors if whole else None

    def put(self, name: str, tensors: Piece) -> None:
        """Write a finished piece.

        Raises:
            BitPolicyError: the folder, with all earlier pieces, was removed after it was opened.
        """
        if not self._folder.is_dir():
            raise BitPolicyError(f"{self._folder} was removed while it was being written; run the command again")
        kept = {key: tensor.contiguous() for key, tensor in tensors.items()}
        with written_aside(self._folder / f"{name}.safetensors") as aside:
            save_file(kept, aside, metadata={"sha256": tensors_digest(sorted(kept.items()))})
