"""A checksum inside a small file of ours: what was changed since it was written is not believed.

    sha256 = SHA-256 of the other entries as JSON with sorted keys, and of name, dtype, shape and bytes of each tensor

JSON and numbers in safetensors still read with a digit changed, so nothing else would tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bitpolicy.policies.identity import tensors_digest
from bitpolicy.policies.storage.file_source import require_plain_file

KEY = "sha256"
_NONE: Mapping[str, torch.Tensor] = MappingProxyType({})


def sealed(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] = _NONE) -> dict[str, Any]:
    """The content with its checksum and that of the tensors beside it."""
    return {**content, KEY: _checksum(content, tensors)}


def unsealed(content: Any, tensors: Mapping[str, torch.Tensor] = _NONE, required: bool = False) -> dict[str, Any]:
    """The content without its checksum, which is right.

    Args:
        required: whether content without a checksum, as older versions wrote, is refused, too.

    Raises:
        ValueError: it is no mapping, or not as it was written.
    """
    if not isinstance(content, dict):
        raise ValueError(f"found {type(content).__name__}, needed a mapping")
    held = {key: value for key, value in content.items() if key != KEY}
    if KEY not in content and not required:
        return held
    if content.get(KEY) != _checksum(held, tensors):
        raise ValueError("its checksum is not that of its content, so it is damaged or was edited")
    return held


def read_sealed(path: Path, required: bool = False) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        OSError: it cannot be read, or is no plain file.
        ValueError: as `unsealed`, or it is no JSON.
    """
    require_plain_file(path)
    try:
        return unsealed(json.loads(path.read_text(encoding="utf-8")), required=required)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _checksum(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    text = json.dumps(content, sort_keys=True) + (tensors_digest(sorted(tensors.items())) if tensors else "")
    return hashlib.sha256(text.encode()).hexdigest()
