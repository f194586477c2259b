"""Tensors from files equal those from memory: the same names, shapes, values and hash."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.identity import weights_hash
from bitpolicy.policies.storage import file_source as module
from bitpolicy.policies.storage.calibration_file import load_calibration
from bitpolicy.policies.storage.file_source import FileSource
from bitpolicy.policies.storage.source import ModuleSource, Unchanged, joined, source_hash, source_hashes
from bitpolicy.policies.storage.source_converted import converted
from bitpolicy.policies.storage.stored_tensors import stored_tensors
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.table_files import read_table

TENSORS = {"b.x": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3), "c": torch.randn(4, 2).bfloat16()}


@pytest.mark.parametrize("mapped", [0, 10**9], ids=["opened anew for each", "kept open"])
def test_files_are_read_as_safetensors_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: int) -> None:
    monkeypatch.setattr(module, "_MAPPED", mapped)
    save_file({"a": TENSORS["a"]}, tmp_path / "1.safetensors")
    save_file({name: TENSORS[name] for name in ("b.x", "c")}, tmp_path / "2.safetensors")
    found = FileSource(sorted(tmp_path.iterdir()))
    assert {name: (spec.dtype, spec.shape) for name, spec in found.specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    kept = {name: found.read(name) for name in ("c", "a", "b.x", "c", "a")}  # they outlive their file
    assert [name for name, tensor in kept.items() if not torch.equal(tensor, TENSORS[name])] == []


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
def test_the_hash_of_files_is_that_of_the_model(toy_unet: Any, tmp_path: Path, storage: torch.dtype) -> None:
    toy_unet.save_pretrained(tmp_path, max_shard_size="50KB")
    files = FileSource(sorted(tmp_path.glob("*.safetensors")))
    assert source_hash(files, storage) == weights_hash(toy_unet, storage)
    assert source_hash(ModuleSource(toy_unet), storage) == weights_hash(toy_unet, storage)


def test_a_tensor_that_changes_between_two_reads_is_an_error() -> None:
    layer = nn.Linear(3, 2)
    source = Unchanged(ModuleSource(layer), torch.float16)
    before = source_hash(source, torch.float16)
    assert source_hash(source, torch.float16) == before == weights_hash(layer, torch.float16)
    layer.weight.data[0, 0] += 1
    source.read("bias")
    with pytest.raises(BitPolicyError, match=r"files changed .*: weight is .*run the command again"):
        source.read("weight")


def test_files_are_compared_with_the_model_in_memory_in_the_storage_dtype(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    save_file(layer.half().state_dict(), tmp_path / "model.safetensors")
    source = Unchanged(FileSource([tmp_path / "model.safetensors"]), torch.float16, ModuleSource(layer.float()))
    assert torch.equal(source.read("weight"), layer.weight.half())
    save_file({**layer.half().state_dict(), "bias": torch.ones(2).half()}, tmp_path / "model.safetensors")
    changed = Unchanged(FileSource([tmp_path / "model.safetensors"]), torch.float16, ModuleSource(layer.float()))
    changed.read("weight")
    with pytest.raises(BitPolicyError, match=r"files changed .*: bias is "):
        changed.read("bias")


def test_several_models_have_separate_hashes_and_are_read_as_one() -> None:
    models = {"transformer": nn.Linear(3, 2), "transformer_2": nn.Linear(2, 5)}
    sources = {name: ModuleSource(model) for name, model in models.items()}
    assert source_hashes(sources, torch.float16) == Target(models).weights_hashes(torch.float16)
    assert torch.equal(joined(sources).read("transformer_2.bias"), models["transformer_2"].bias)


def test_a_value_that_float16_cannot_hold_is_an_error() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data[1, 1] = 1e6
    with pytest.raises(BitPolicyError, match=r"weight has values that torch\.float16 cannot hold; .* bfloat16"):
        source_hash(ModuleSource(layer), torch.float16)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("cut", r"cannot read .*model\.safetensors, which is damaged.*download it again"),
        (
            "pointer",
            r"model\.safetensors is a git-lfs pointer.*; run `git lfs pull`, or",
        ),
        ("missing", r"model\.safetensors is missing; download it again"),
        ("a folder", r"cannot read .*model\.safetensors: .* regular file; make it a file that this user can read"),
    ],
)
def test_the_error_says_what_is_wrong_with_a_file(tmp_path: Path, damage: str, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        path.unlink()
    if damage == "a folder":
        path.mkdir()
    with pytest.raises(BitPolicyError, match=reason) as found:
        FileSource([path])
    assert ("git-lfs" in str(found.value)) == (damage == "pointer")


@pytest.fixture
def forbidden(tmp_path: Path) -> Iterator[Path]:
    """A safetensors file that the current user cannot read, even if root runs the tests."""
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield path
    finally:
        if root:
            os.seteuid(0)


def test_a_file_without_permission_is_not_called_missing(forbidden: Path) -> None:
    needles = r"model\.safetensors: Permission denied; make it a file that this user can read"
    with pytest.raises(BitPolicyError, match=needles) as found:
        FileSource([forbidden])
    with pytest.raises(BitPolicyError, match="Permission denied") as calibration:
        load_calibration(forbidden)
    with pytest.raises(BitPolicyError, match="Permission denied") as stored:
        stored_tensors([forbidden])
    with pytest.raises(BitPolicyError, match="Permission denied") as table:
        read_table(forbidden)
    for error in (found, calibration, stored, table):
        assert "No such file" not in str(error.value)


# Checkpoints in another layout


def other_layout(tensors: dict[str, Any]) -> dict[str, Any]:
    """What converters do: rename, split, swap, join, drop a dimension, cast, create, leave out."""
    query, key, value = tensors.pop("qkv").chunk(3, dim=0)
    shift, scale = tensors.pop("mod").chunk(2, dim=0)
    return {
        "to_q": query,
        "to_k": key,
        "to_v": value,
        "norm": torch.cat([scale, shift], dim=0),
        "proj": tensors.pop("conv")[:, :, 0, 0],
        "half": key.to(torch.float16),
        "zeros": torch.zeros_like(query),
        "same": tensors.pop("same"),
        "nothing": tensors.get("nothing"),
    }


def writes(tensors: dict[str, Any]) -> dict[str, Any]:
    return {"same": tensors["same"].clone().add_(1)}


def looks(tensors: dict[str, Any]) -> dict[str, Any]:
    return {"same": tensors["same"] * 2 if tensors["same"].sum().item() > -1e9 else tensors["same"]}


class Watched:
    """Records what was read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._module = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in tensors.items()})
        self._source, self.read_names = ModuleSource(self._module), list[str]()

    @property
    def specs(self) -> Any:
        return self._source.specs

    def read(self, name: str) -> torch.Tensor:
        self.read_names.append(name)
        return self._source.read(name)


@pytest.fixture
def original() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"qkv": (12, 4), "mod": (8,), "conv": (3, 5, 1, 1), "same": (2, 2)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.mark.parametrize("convert", [other_layout, writes, looks])
def test_a_conversion_is_done_tensor_by_tensor(
    original: dict[str, torch.Tensor], convert: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    expected = {name: t for name, t in convert(dict(original)).items() if t is not None}
    found = converted(Watched(original), convert)
    assert {name: (spec.dtype, spec.shape) for name, spec in found.specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in expected.items()
    }
    assert [name for name, tensor in expected.items() if not torch.equal(found.read(name), tensor)] == []


def test_only_the_inputs_of_a_tensor_are_read(original: dict[str, torch.Tensor]) -> None:
    base = Watched(original)
    found = converted(base, other_layout)
    assert base.read_names == []
    found.read("norm")
    found.read("same")
    assert set(base.read_names) == {"mod", "same"}


def test_a_name_in_two_files_is_read_from_the_last(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    shutil.copy(tmp_path / "1.safetensors", tmp_path / "0.safetensors")
    save_file({"a": torch.ones(3)}, tmp_path / "1.safetensors")
    found = FileSource([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    assert torch.equal(found.read("a"), load_file(tmp_path / "1.safetensors")["a"])
