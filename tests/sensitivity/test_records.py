"""Finished pieces on disk: they are read as written, damaged ones count as missing, and settings have separate keys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bitpolicy.sensitivity.records import Records, settings_key
from bitpolicy.sensitivity.rounding.kept_rounding import is_whole

PIECE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1, 2])}


def test_a_piece_is_read_as_it_was_written(tmp_path: Path) -> None:
    Records(tmp_path / "a").put("piece", PIECE)
    found = Records(tmp_path / "a").get("piece")
    assert found is not None
    assert set(found) == set(PIECE)
    assert all(torch.equal(found[name], tensor) for name, tensor in PIECE.items())


def test_a_piece_that_was_never_written_is_none(tmp_path: Path) -> None:
    assert Records(tmp_path).get("piece") is None


@pytest.mark.parametrize("keep", [0, 4, 8, 30, -1])
def test_a_damaged_piece_counts_as_missing(tmp_path: Path, keep: int) -> None:
    records = Records(tmp_path)
    records.put("piece", PIECE)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    assert records.get("piece") is None


def test_a_partly_written_piece_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("bitpolicy.sensitivity.records.save_file", cut)
    with pytest.raises(KeyboardInterrupt):
        Records(tmp_path).put("piece", PIECE)
    assert Records(tmp_path).get("piece") is None
    assert list(tmp_path.iterdir()) == []


def test_a_readable_piece_with_changed_values_counts_as_missing(tmp_path: Path) -> None:
    """A flipped bit in the middle of the values, which only the checksum detects."""
    records = Records(tmp_path)
    records.put("piece", PIECE)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert records.get("piece") is None


def test_the_key_depends_on_the_settings_but_not_on_their_order() -> None:
    settings = {"steps": 20, "samples": [("cat", 0), ("dog", 1)], "call": {"guidance_scale": 3.0}}
    assert settings_key(settings) == settings_key(dict(reversed(settings.items())))
    others = [
        settings | {"steps": 21},
        settings | {"samples": [("dog", 1), ("cat", 0)]},
        settings | {"call": {"guidance_scale": 3.5}},
        settings | {"call": {}},
    ]
    assert len({settings_key(other) for other in [settings, *others]}) == 5


def test_a_named_pipe_in_place_of_a_piece_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "piece.safetensors")
    assert Records(tmp_path).get("piece") is None
    assert not is_whole(tmp_path / "piece.safetensors", ["a"])
