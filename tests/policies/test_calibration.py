"""The calibration file belongs to one policy, and says so by its hash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.calibration import calibration_hash, load_calibration, save_calibration

MEANS = {"conv_in": torch.randn(4, 3, 3), "attn.to_q": torch.randn(16)}


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    save_calibration(MEANS, tmp_path / "calibration.safetensors")
    found = load_calibration(tmp_path / "calibration.safetensors", calibration_hash(MEANS))
    assert set(found) == set(MEANS)
    assert all(torch.equal(found[name], MEANS[name]) for name in MEANS)


def test_two_files_of_the_same_means_are_the_same_bytes(tmp_path: Path) -> None:
    save_calibration(MEANS, tmp_path / "a")
    save_calibration(dict(reversed(MEANS.items())), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_strided_means_are_saved_as_they_read(tmp_path: Path) -> None:
    strided = torch.arange(6.0).reshape(2, 3).t()
    save_calibration({"a": strided}, tmp_path / "a")
    assert torch.equal(load_calibration(tmp_path / "a")["a"], strided)


@pytest.mark.parametrize(
    "other",
    [
        {"conv_in": MEANS["conv_in"]},
        {**MEANS, "conv_in": MEANS["conv_in"] + 1e-6},
        {"conv_in": MEANS["conv_in"], "attn.to_k": MEANS["attn.to_q"]},
        {**MEANS, "conv_in": MEANS["conv_in"].reshape(4, 9)},
    ],
    ids=["fewer", "another value", "another name", "another shape"],
)
def test_another_calibration_has_another_hash_and_is_refused(tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
    save_calibration(other, tmp_path / "calibration.safetensors")
    with pytest.raises(BitPolicyError, match=r"has hash sha256:.*, the policy was made with sha256:.*; use the file"):
        load_calibration(tmp_path / "calibration.safetensors", calibration_hash(MEANS))


@pytest.mark.parametrize(
    "content", [None, b"", b"no safetensors", b"\xff" * 64], ids=["missing", "empty", "text", "junk"]
)
def test_a_file_that_cannot_be_read_is_told_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "calibration.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BitPolicyError, match="keep the two together, or set bias_correction: false"):
        load_calibration(path)


def test_the_order_of_the_layers_does_not_change_the_hash() -> None:
    assert calibration_hash(MEANS) == calibration_hash(dict(reversed(MEANS.items())))
