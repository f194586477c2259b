"""An exported folder loads only if every component is as it was written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from pipeline_folders import TEXT, VAE, change
from safetensors.torch import load_file, save_file

import bitpolicy
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.checkpoints import manifest
from bitpolicy.policies.checkpoints.manifest import FILE, verify


@pytest.fixture
def folder(exported: Any, tmp_path: Path) -> Path:
    """A copy of the exported pipeline."""
    return shutil.copytree(exported.folder, tmp_path / "checkpoint")


def without_one(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(max(tensors))
    save_file(tensors, path)


def edited(path: Path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "norm_eps": 1e-3}))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a text encoder that lacks a tensor": (TEXT, without_one, r"has [\d,]+ bytes, .*written with [\d,]+"),
    "a text encoder with another value": (TEXT, lambda p: change(p, **changed(p)), "SHA-256 differs"),
    "a VAE that is gone": (VAE, Path.unlink, "is missing"),
    "another config": ("vae/config.json", edited, "bytes, .*written with"),
    "a file that a loader would prefer": (
        "text_encoder/model.safetensors.index.json",
        lambda p: p.write_text(json.dumps({"weight_map": {}})),
        r"not part of this checkpoint: bitpolicy\.json",
    ),
    "a packed config without its quantization": (
        "unet/config.json",
        lambda p: p.write_text(json.dumps({k: v for k, v in json.loads(p.read_text()).items() if "quant" not in k})),
        "bytes, .*written with",
    ),
}


def changed(path: Path) -> dict[str, torch.Tensor]:
    name, tensor = min(load_file(path).items())
    return {name.replace(".", "__"): tensor + 1}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_changed_folder_is_refused(folder: Path, kind: str) -> None:
    name, damage, message = DAMAGE[kind]
    damage(folder / name)
    with pytest.raises(BitPolicyError, match=message):
        verify(folder)
    with pytest.raises(BitPolicyError, match=message):
        bitpolicy.load_pipeline(folder)


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if "without its quantization" not in kind])
def test_diffusers_own_loader_refuses_a_changed_folder_too(folder: Path, kind: str) -> None:
    name, damage, message = DAMAGE[kind]
    damage(folder / name)
    with pytest.raises((BitPolicyError, OSError), match=f"{message}|no file named"):
        DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(BitPolicyError, match=message):
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def test_large_files_are_hashed_only_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "SMALL", 10)
    change(folder / VAE, **changed(folder / VAE))
    verify(folder)
    with pytest.raises(BitPolicyError, match="SHA-256 differs"):
        verify(folder, everything=True)
    with pytest.raises(BitPolicyError, match="SHA-256 differs"):
        bitpolicy.load_pipeline(folder, verify="all")


def test_files_that_people_edit_may_change(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    (folder / "policy.yaml").write_text((folder / "policy.yaml").read_text() + "# mine\n")
    (folder / "vae" / ".DS_Store").write_text("")
    (folder / "picture.png").write_bytes(b"")
    verify(folder, everything=True)
    bitpolicy.load_pipeline(folder)


def test_a_missing_tensor_is_an_error_without_a_manifest_too(folder: Path) -> None:
    (folder / FILE).unlink()
    bitpolicy.load_pipeline(folder)
    without_one(folder / TEXT)
    with pytest.raises(BitPolicyError, match=r"CLIPTextModel in .*text_encoder lack 1 tensors, e\.g\. .*download"):
        bitpolicy.load_pipeline(folder)


def test_packed_weights_without_their_quantization_config_are_refused(folder: Path) -> None:
    (folder / FILE).unlink()
    DAMAGE["a packed config without its quantization"][1](folder / "unet" / "config.json")
    with pytest.raises(BitPolicyError, match=r"UNet2DConditionModel in .*unet lack \d+ tensors, .*weight, and have"):
        bitpolicy.load_pipeline(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"version": 1}', '{"version": 1, "files": []}', '{"version": 1, "files": {"a": {}}}'],
    ids=str,
)
def test_an_invalid_manifest_is_an_error(folder: Path, text: str) -> None:
    (folder / FILE).write_text(text)
    with pytest.raises(BitPolicyError, match=r"cannot read .*bitpolicy\.json"):
        verify(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_without_read_permission_is_an_error(folder: Path) -> None:
    (folder / VAE).chmod(0)
    with pytest.raises(BitPolicyError, match=r"cannot read .*: Permission denied; make it a file that this user can"):
        verify(folder)


def test_a_newer_manifest_is_an_error(folder: Path) -> None:
    (folder / FILE).write_text('{"version": 2, "files": {}}')
    with pytest.raises(BitPolicyError, match=r"version 2, .*1; install a newer bitpolicy"):
        verify(folder)


def test_the_loaders_are_restored_afterwards(folder: Path) -> None:
    before = UNet2DConditionModel.from_pretrained
    (folder / FILE).unlink()
    without_one(folder / TEXT)
    with pytest.raises(BitPolicyError):
        bitpolicy.load_pipeline(folder)
    assert UNet2DConditionModel.from_pretrained == before
