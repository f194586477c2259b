"""Finished pieces of a probe on disk, so that an interrupted one goes on where it stopped.

Each piece is one small safetensors file, written aside and renamed, in a folder named by a hash of everything the
numbers depend on: another model, prompt, seed, scheduler or format is another folder, and old pieces are never mistaken
for new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bitpolicy.policies.atomic import written_aside


def settings_key(settings: Mapping[str, Any]) -> str:
    """A short hash of JSON-like settings, the same for the same settings in any order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Records:
    """The pieces under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> dict[str, torch.Tensor] | None:
        """The finished piece, or None; a file that does not read counts as not there."""
        path = self._folder / f"{name}.safetensors"
        try:
            return load_file(path) if path.exists() else None
        except SafetensorError:
            return None

    def put(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        with written_aside(self._folder / f"{name}.safetensors") as aside:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside)

    def get_or_make(self, name: str, make: Callable[[], Mapping[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        """The finished piece, made and kept if it is not there."""
        found = self.get(name)
        if found is None:
            found = dict(make())
            self.put(name, found)
        return found
