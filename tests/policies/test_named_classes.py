"""A file may name classes of diffusers and transformers; nothing else is imported because a file names it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bitpolicy import BitPolicyError
from bitpolicy.pipelines.loading import open_pipeline
from bitpolicy.pipelines.single_file import SingleFile
from bitpolicy.policies.loading.named_classes import class_named, require_known_classes

INDEX = Path("model_index.json")
SOUND = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}


def test_classes_of_the_two_libraries_and_of_their_pipelines_are_found() -> None:
    require_known_classes(SOUND, INDEX)
    assert class_named("transformers", "CLIPTextModel", INDEX).__name__ == "CLIPTextModel"
    assert class_named("transformers", "CLIPFeatureExtractor", INDEX).__name__.startswith("CLIPImageProcessor")
    assert class_named("stable_diffusion", "StableDiffusionSafetyChecker", INDEX).__module__.startswith("diffusers.")


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("evil", "X"),
        ("os", "system"),
        ("diffusers", "logging"),
        ("diffusers", "NoSuchModel"),
        ("transformers", "torch"),
        ("diffusers.utils", "export_to_video"),
        ("__class__", "__name__"),
        ("", "X"),
    ],
)
def test_no_other_class_is_found(library: str, name: str) -> None:
    for index in ({**SOUND, "vae": [library, name]}, {**SOUND, "_class_name": [library, name]}):
        with pytest.raises(BitPolicyError, match=r"model_index\.json"):
            require_known_classes(index, INDEX)


def test_a_pipeline_class_that_is_not_a_pipeline_is_refused() -> None:
    with pytest.raises(BitPolicyError, match="pipeline class of diffusers"):
        require_known_classes({**SOUND, "_class_name": "UNet2DModel"}, INDEX)


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module on the path that leaves a file when it runs; returns the path of that file."""
    trace = tmp_path / "it ran"
    (tmp_path / "evil_module.py").write_text(f"open({str(trace)!r}, 'w')\nclass X:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    return trace


def test_a_folder_runs_no_module_of_its_own(evil: Path, new_toy_pipeline: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    new_toy_pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["evil_module", "X"]}))
    with pytest.raises(BitPolicyError, match=r"evil_module\.X: only classes of diffusers and transformers"):
        open_pipeline(folder)
    with pytest.raises(BitPolicyError, match=r"evil_module\.X: only classes of diffusers and transformers"):
        SingleFile.of(folder / "unet" / "diffusion_pytorch_model.safetensors", str(folder))
    assert not evil.exists()
