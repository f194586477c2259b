"""The checksum in our small files: a changed file is refused, and one without a checksum where one is required."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpolicy.policies.storage.sealed import read_sealed, sealed, unsealed

CONTENT: dict[str, Any] = {"b": [1, 2.5, None], "a": {"name": "é", "tiny": 1e-300, "whole": True}}
TENSORS = {"x": torch.arange(6.0).reshape(2, 3), "n": torch.tensor([], dtype=torch.int8)}


def test_sealed_content_survives_json() -> None:
    assert unsealed(json.loads(json.dumps(sealed(CONTENT))), required=True) == CONTENT
    assert unsealed(json.loads(json.dumps(sealed(CONTENT, TENSORS))), TENSORS, required=True) == CONTENT


@pytest.mark.parametrize(
    "changed",
    [{"b": [1, 2.5]}, {"b": [1.0, 2.5, None]}, {"b": [True, 2.5, None]}, {"c": 1}, {"sha256": ""}, {"sha256": None}],
    ids=str,
)
def test_another_entry_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"checksum.*damaged or was edited"):
        unsealed({**sealed(CONTENT), **changed})


@pytest.mark.parametrize(
    "tensors",
    [
        {**TENSORS, "x": TENSORS["x"] + 1},
        {**TENSORS, "x": TENSORS["x"].reshape(3, 2)},
        {**TENSORS, "x": TENSORS["x"].view(torch.int32)},
        {"x": TENSORS["x"]},
        {"y": TENSORS["x"], "n": TENSORS["n"]},
    ],
    ids=["values", "shape", "dtype", "one missing", "name"],
)
def test_other_tensors_are_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="checksum"):
        unsealed(sealed(CONTENT, TENSORS), tensors)


def test_content_without_a_checksum_is_read_unless_one_is_required() -> None:
    assert unsealed(CONTENT) == CONTENT
    with pytest.raises(ValueError, match="checksum"):
        unsealed(CONTENT, required=True)


@pytest.mark.parametrize("text", ["", "[]", "1", "{", "[" * 100_000, "\0", '{"a": 1}x'], ids=lambda text: text[:5])
def test_a_file_with_other_content_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_sealed(tmp_path / "file")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_anything_but_a_regular_file_is_refused_without_waiting(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "file")
    with pytest.raises(OSError, match="not a regular file"):
        read_sealed(tmp_path / "file")
