"""Folders that cannot be exported are refused, with the remedy, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_folders import change

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.loading import open_pipeline
from bitpolicy.policies.checkpoints.folder_parts import FolderParts, is_streamable
from bitpolicy.policies.loading import diffusers_files

F16 = torch.float16


def change_config(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_pickles_are_refused_with_the_remedy(saved: Callable[..., Path]) -> None:
    for name in ("unet", "vae"):
        folder = saved(F16)
        weights = folder / name / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        assert not is_streamable(folder, ["unet"])
        with pytest.raises(BitPolicyError, match=rf"{name} has its weights only as .*\.bin, a pickle.*save_pretrained"):
            FolderParts(folder)


def test_weights_that_do_not_fit_the_config_are_refused(saved: Callable[..., Path]) -> None:
    folder = saved(F16)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    change(path, conv_out__weight=torch.zeros(3, 3))
    with pytest.raises(BitPolicyError, match=r"conv_out\.weight has shape \(3, 3\), .* says \(4, 16, 3, 3\)"):
        FolderParts(folder)
    change(path, conv_out__weight=None)
    with pytest.raises(BitPolicyError, match=r"lacks 1 of the \d+ tensors of UNet2DConditionModel, e\.g\. conv_out"):
        FolderParts(folder)


@pytest.mark.parametrize(("component", "entry"), [("unet", "layers_per_block"), ("text_encoder", "num_hidden_layers")])
def test_a_config_that_asks_for_billions_of_layers_is_refused_before_they_are_built(
    saved: Callable[..., Path], component: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers_files, "MOST_MODULES", 2000)
    folder = saved(F16)
    change_config(folder / component / "config.json", **{entry: 2**31})
    for build in (lambda: FolderParts(folder, [component]), lambda: open_pipeline(folder)):
        with pytest.raises(BitPolicyError, match=f"{component} asks for a model of more than 2,000 modules"):
            build()
    with (
        diffusers_files.bounded({}),
        pytest.raises(BitPolicyError, match="a config asks for a model of more than 2,000 modules"),
    ):
        torch.nn.ModuleList(torch.nn.Linear(1, 1, device="meta") for _ in range(2001))


@pytest.mark.parametrize(
    ("component", "entries", "reason"),
    [
        ("unet", {"layers_per_block": "two"}, "has layers_per_block: 'two', .*UNet2DConditionModel needs a number"),
        ("unet", {"norm_num_groups": {}}, "has norm_num_groups: {}, .*UNet2DConditionModel needs a number"),
        ("unet", {"down_block_types": [5, 5]}, ".*UNet2DConditionModel: .*; download it again"),
        ("unet", {"norm_num_groups": 0}, ".*UNet2DConditionModel: .*zero"),
        ("text_encoder", {"hidden_size": "wide"}, ".*CLIPTextModel"),
        ("text_encoder", {"num_attention_heads": 0}, ".*CLIPTextModel"),
    ],
)
def test_a_config_that_no_model_can_be_built_from_is_an_error(
    saved: Callable[..., Path], component: str, entries: dict[str, Any], reason: str
) -> None:
    folder = saved(F16)
    change_config(folder / component / "config.json", **entries)
    with pytest.raises(BitPolicyError, match=f"the config in .*{component} {reason}"):
        FolderParts(folder, [component])


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_config_that_is_not_json_is_an_error(saved: Callable[..., Path], component: str) -> None:
    folder = saved(F16)
    (folder / component / "config.json").write_text("{")
    with pytest.raises(BitPolicyError, match=rf"cannot read .*{component}.config\.json"):
        FolderParts(folder, [component])


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_an_error_in_our_own_code_is_not_blamed_on_the_config(
    saved: Callable[..., Path], component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised while a model is built, in our hook that counts modules."""
    monkeypatch.setattr(diffusers_files, "MOST_MODULES", "many")  # which no number can be compared with
    with pytest.raises(TypeError, match="not supported between"):
        FolderParts(saved(F16), [component])


def test_pickles_are_never_loaded(saved: Callable[..., Path]) -> None:
    folder = saved(F16)
    torch.save({}, folder / "vae" / "diffusion_pytorch_model.bin")
    open_pipeline(folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BitPolicyError, match=r"vae has its weights only as .*\.bin, a pickle"):
        open_pipeline(folder)


def test_a_damaged_tokenizer_is_an_error(saved: Callable[..., Path]) -> None:
    folder = saved(F16)
    found = [path for path in (folder / "tokenizer").iterdir() if path.suffix == ".json"]
    for path in found:
        path.write_text("{")
    with pytest.raises(BitPolicyError, match=f"cannot load the pipeline in {folder}"):
        open_pipeline(folder)


def test_a_missing_shard_is_an_error(saved: Callable[..., Path]) -> None:
    folder = saved(F16, max_shard_size="100KB")
    gone = sorted((folder / "unet").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(BitPolicyError, match=f"lacks {gone.name}, which .*index.json names; download"):
        FolderParts(folder)


def test_a_missing_variant_is_an_error(half: Path) -> None:
    with pytest.raises(BitPolicyError, match=r"no weights of the variant 'bf16'; .*--variant"):
        FolderParts(half, variant="bf16")


def test_a_packed_denoiser_is_refused(exported: Any) -> None:
    with pytest.raises(BitPolicyError, match="unet is already quantized"):
        FolderParts(exported.folder)


@pytest.mark.parametrize("component", ["transformer", "scheduler_2"])
def test_a_missing_component_is_an_error(half: Path, component: str) -> None:
    with pytest.raises(BitPolicyError, match=f"no component '{component}'; it has .*unet.*--component"):
        FolderParts(half, [component])


def test_streaming_is_refused_for_a_folder_without_an_index(tmp_path: Path) -> None:
    assert not is_streamable(tmp_path, ["unet"])
    (tmp_path / "model_index.json").write_text("{")
    assert not is_streamable(tmp_path, ["unet"])
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    assert is_streamable(tmp_path, ["unet"])
    with pytest.raises(BitPolicyError, match="no component 'unet' or 'transformer'; it has none"):
        FolderParts(tmp_path)
