"""Pipelines whose JSON files have random damage are exported and loaded, or refused with an error that names a file.

What is written stays in the folder that was asked for, whatever a file names.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import mutated_bytes, mutated_json

from bitpolicy import BitPolicyError, load_pipeline
from bitpolicy.policies.checkpoints.folder_parts import FolderParts
from bitpolicy.policies.checkpoints.pipeline import export_parts

TIMES = 40
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"unet/{WEIGHTS}.index.json"


@pytest.fixture(scope="module")
def source(new_toy_pipeline: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unquantized pipeline of `exported`, its U-Net in shards."""
    folder = tmp_path_factory.mktemp("fuzz") / "source"
    pipe = new_toy_pipeline()
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        torch.nn.Module.to(model, torch.float16)
    pipe.save_pretrained(folder, max_shard_size="100KB")
    return folder


def damaged(path: Path, whole: bytes, draw: random.Random, i: int) -> None:
    if i % 4 == 3:
        path.write_bytes(mutated_bytes(whole, draw))
    else:
        path.write_text(json.dumps(mutated_json(json.loads(whole), draw)))


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "text_encoder/config.json", INDEX])
def test_a_damaged_source_is_exported_or_refused(exported: Any, source: Path, tmp_path: Path, file: str) -> None:
    draw, refused = random.Random(file), 0
    folder = shutil.copytree(source, tmp_path / "copy")
    whole = (folder / file).read_bytes()
    for i in range(TIMES):
        damaged(folder / file, whole, draw, i)
        try:
            FolderParts(folder, ["unet", "text_encoder"])
            export_parts(FolderParts(folder, ["unet"]), exported.policy, exported.calibration, tmp_path / "out")
        except BitPolicyError:
            refused += 1
        assert {path.name for path in tmp_path.iterdir()} <= {"copy", "out"}
    assert 0 < refused < TIMES


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
def test_a_damaged_checkpoint_is_loaded_or_refused(exported: Any, tmp_path: Path, file: str) -> None:
    draw, refused = random.Random(file), 0
    folder = shutil.copytree(exported.folder, tmp_path / "copy")
    (folder / "bitpolicy.json").unlink()  # which would tell at once
    whole = (folder / file).read_bytes()
    for i in range(TIMES):
        damaged(folder / file, whole, draw, i)
        try:
            load_pipeline(folder)
        except BitPolicyError:
            refused += 1
        assert torch.get_default_dtype() == torch.float32
    assert 0 < refused < TIMES


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "..", "", "a\\b"])
def test_a_component_that_is_a_path_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(source, tmp_path / "in" / "copy")
    shutil.copytree(source / "vae", tmp_path / "in" / "evil")
    change(folder / "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(BitPolicyError, match=r"model_index.json names '.*', which is a path; download the model again"):
        FolderParts(folder, ["unet"])


@pytest.mark.parametrize("name", ["../evil.safetensors", "/tmp/evil.safetensors"])
def test_a_shard_that_is_a_path_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(source, tmp_path / "copy")
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    change(folder / INDEX, weight_map={**listed, "conv_in.bias": name})
    with pytest.raises(BitPolicyError, match=rf"index.json names '{name}', which is a path; download the model again"):
        FolderParts(folder, ["unet"])


@pytest.mark.parametrize(
    ("file", "entries", "complaint"),
    [
        ("unet/config.json", {"quantization_config": {"storage_dtype": "load"}}, "storage_dtype is 'load', expected"),
        ("unet/config.json", {"quantization_config": [1]}, "quantization_config is list, expected a mapping"),
        ("model_index.json", {"unet": ["diffusers"]}, ""),
    ],
    ids=["a dtype that is none", "a list", "half an entry"],
)
def test_a_checkpoint_with_a_wrong_entry_is_refused(
    exported: Any, tmp_path: Path, file: str, entries: dict[str, Any], complaint: str
) -> None:
    folder = shutil.copytree(exported.folder, tmp_path / "copy")
    change(folder / file, **entries)
    with pytest.raises(BitPolicyError, match=complaint):
        load_pipeline(folder)
