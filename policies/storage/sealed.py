"""A checksum inside a small file that bitpolicy writes: a file that has changed since it was written is refused.

    sha256 = SHA-256 of the other entries as JSON with sorted keys, and of name, dtype, shape and bytes of each tensor

JSON and numbers in safetensors can still be read after a digit has changed, so nothing else would notice.
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
    """The content with a checksum of itself and of the tensors stored with it."""
    return {**content, KEY: _checksum(content, tensors)}


def unsealed(content: Any, tensors: Mapping[str, torch.Tensor] = _NONE, required: bool = False) -> dict[str, Any]:
    """The content without its checksum, after checking it.

    Args:
        required: whether to refuse content without a checksum, too. Older versions wrote none.

    Raises:
        ValueError: the content is not a mapping, or has changed since it was written.
    """
    if not isinstance(content, dict):
        raise ValueError(f"found {type(content).__name__}, needed a mapping")
    held = {key: value for key, value in content.items() if key != KEY}
    if KEY not in content and not required:
        return held
    if content.get(KEY) != _checksum(held, tensors):
        raise ValueError("its checksum does not match its content, so it is damaged or was edited")
    return held


def read_sealed(path: Path, required: bool = False) -> dict[str, Any]:
    """The content of a sealed JSON file.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError: as for `unsealed`, or it is not JSON.
    """
    require_plain_file(path)
    try:
        return unsealed(json.loads(path.read_text(encoding="utf-8")), required=required)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _checksum(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    text = json.dumps(content, sort_keys=True) + (tensors_digest(sorted(tensors.items())) if tensors else "")
    return hashlib.sha256(text.encode()).hexdigest()
