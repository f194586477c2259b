"""Components that are not packed are linked or copied if they have the wanted dtype, otherwise cast."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from pipeline_folders import TEXT, VAE, differing, export, files, tensors
from safetensors.torch import save_file

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.checkpoints.checkpoint import checkpoint_bytes
from bitpolicy.policies.checkpoints.folder_parts import FolderParts
from bitpolicy.policies.checkpoints.parts import MemoryParts
from bitpolicy.policies.checkpoints.pipeline import export_parts
from bitpolicy.policies.storage import linking

F16, F32 = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def no_clones(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As on a file system without clones."""
    if "clone" not in request.node.name:
        monkeypatch.setattr(linking, "_clone", lambda *_: False)


def test_weights_of_the_wanted_dtype_are_the_same_file_and_text_is_a_copy(
    exported: Any, half: Path, tmp_path: Path
) -> None:
    export(exported, half, tmp_path / "out")
    assert (tmp_path / "out" / VAE).samefile(half / VAE)
    assert (tmp_path / "out" / TEXT).samefile(half / TEXT)
    linked = [name for name in files(half) if (p := tmp_path / "out" / name).is_file() and p.samefile(half / name)]
    assert linked == sorted([TEXT, VAE])


def test_links_of_a_hub_cache_are_followed(exported: Any, half: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    shutil.copytree(half, blobs)
    for name in files(blobs):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, (snapshot / name).parent))
    export(exported, snapshot, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()] == []
    assert (tmp_path / "out" / VAE).samefile(blobs / VAE)
    assert differing(tmp_path / "out", exported.folder) == []


def test_a_clone_is_a_separate_file(exported: Any, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing into it, or changing who may read it, leaves the source alone. The system call is played: most file
    systems have none."""

    def ficlone(new: Any, code: int, old: int) -> int:
        assert code == 0x40049409
        while piece := os.read(old, 2**20):
            new.write(piece)
        return 0

    monkeypatch.setattr(linking.fcntl, "ioctl", ficlone)
    before = (half / VAE).read_bytes()
    export(exported, half, tmp_path / "out")
    assert (tmp_path / "out" / VAE).read_bytes() == before
    assert not (tmp_path / "out" / VAE).samefile(half / VAE)


def test_without_clones_the_file_is_linked(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed attempt to clone leaves no file."""

    def refuse(*_: Any) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(linking.fcntl, "ioctl", refuse)
    linking.link_or_copy(half / VAE, tmp_path / "clone")
    assert (tmp_path / "clone").samefile(half / VAE)


def test_a_file_that_cannot_be_linked_is_copied(
    exported: Any, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    export(exported, half, tmp_path / "out")
    assert not (tmp_path / "out" / VAE).samefile(half / VAE)
    assert differing(tmp_path / "out", exported.folder) == []


def test_saving_over_an_export_leaves_its_source_alone(exported: Any, half: Path, tmp_path: Path) -> None:
    """safetensors writes a new file and renames it, which is why linking weights is safe."""
    before = (half / VAE).read_bytes()
    export(exported, half, tmp_path / "out")
    save_file({"a": torch.zeros(3)}, tmp_path / "out" / VAE)
    assert (half / VAE).read_bytes() == before


@pytest.mark.parametrize("stored", [F16, F32], ids=str)
@pytest.mark.parametrize("wanted", [F16, torch.bfloat16, F32], ids=str)
def test_the_bytes_of_other_components_are_those_that_were_predicted(
    exported: Any, saved: Callable[..., Path], tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    folder = saved(stored)
    parts = FolderParts(folder, ["unet"])
    export_parts(parts, exported.policy, exported.calibration, tmp_path / "out", component_dtype=wanted)
    assert parts.others(wanted) == {n: checkpoint_bytes(tmp_path / "out" / n) for n in ("text_encoder", "vae")}
    assert parts.others(wanted) == MemoryParts(exported.pipe, ["unet"]).others(wanted)
    found = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values() if tensor.is_floating_point()} == {wanted}
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert loaded.text_encoder.dtype == wanted
    assert parts.to_write(wanted, tmp_path / "out") == (0 if stored == wanted else sum(parts.others(wanted).values()))


def test_copied_files_need_disk_space_and_linked_files_do_not(
    exported: Any, half: Path, saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.bitpolicy-partial").mkdir()
    (tmp_path / ".out.bitpolicy-partial" / "left by a killed run").write_text("x")
    others = sum(FolderParts(half).others(F16).values())
    packed = exported.nbytes + checkpoint_bytes(exported.folder)  # the calibration lies in it
    for folder, needed in ((half, packed), (saved(F32), packed + others)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=needed - 1: SimpleNamespace(free=free))
        with pytest.raises(BitPolicyError, match=f"{needed - 1:,} bytes free, .* at least {needed:,}; free some space"):
            export(exported, folder, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=needed: SimpleNamespace(free=free))
        export(exported, folder, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
