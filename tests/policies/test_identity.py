"""The identity of a model: its values, and the entries of its config that differ from the defaults of its class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import FrozenDict
from pipeline_folders import change, export
from transformers import CLIPTextConfig, CLIPTextModel

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.checkpoints.folder_parts import FolderParts
from bitpolicy.policies.identity import config_hash, configured
from bitpolicy.policies.policy_records import ModelReference, PolicyError


def with_entry(unet: Any, **entries: Any) -> str:
    unet._internal_dict = FrozenDict({**unet.config, **entries})
    return config_hash(unet)


def test_an_entry_that_changes_images_changes_the_hash(toy_unet: Any) -> None:
    before = config_hash(toy_unet)
    assert with_entry(toy_unet, norm_eps=1e-3) != before
    assert with_entry(toy_unet, norm_eps=1e-5) == before


def test_a_default_a_path_and_a_dtype_do_not_change_the_hash(toy_unet: Any) -> None:
    before = config_hash(toy_unet)
    toy_unet._internal_dict = FrozenDict({k: v for k, v in toy_unet.config.items() if k != "norm_eps"})
    assert config_hash(toy_unet) == before  # as a release wrote it that did not have the entry
    assert with_entry(toy_unet, _name_or_path="elsewhere", quantization_config={"quant_method": "x"}) == before


def test_lists_and_tuples_hash_the_same(toy_unet: Any) -> None:
    before = config_hash(toy_unet)
    assert with_entry(toy_unet, block_out_channels=tuple(toy_unet.config.block_out_channels)) == before


def test_transformers_models_and_schedulers_have_a_config_hash_too() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    plain = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=10))
    other = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=10, hidden_act="gelu"))
    assert config_hash(plain) != config_hash(other)
    assert "max_position_embeddings" not in configured(plain)  # it has the default
    assert configured(DDIMScheduler()) == {"class": "DDIMScheduler"}
    assert configured(DDIMScheduler(beta_start=0.1)) == {"class": "DDIMScheduler", "beta_start": 0.1}
    assert configured(None) == {"class": "NoneType"}


def test_a_policy_refuses_a_model_with_another_config(toy_unet: Any) -> None:
    about = ModelReference(id="toy", component="unet", class_name="U", sha256="0", config=config_hash(toy_unet))
    about.require_config("unet", toy_unet)
    about.model_copy(update={"config": None}).require_config("unet", toy_unet)
    with_entry(toy_unet, norm_eps=1e-3)
    with pytest.raises(PolicyError, match=r"whose unet had a config with sha256 .*run search-policy"):
        about.require_config("unet", toy_unet)


def test_there_is_a_config_for_each_component() -> None:
    with pytest.raises(ValueError, match="2 in component, 2 in class_name, 2 in sha256, 1 in config"):
        ModelReference(id="toy", component="a,b", class_name="A,B", sha256="0,1", config="2")


@pytest.mark.parametrize("name", ["tokenizer/tokenizer_config.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_file_that_changes_while_a_folder_is_exported_stops_it(
    exported: Any, saved: Callable[..., Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that was measured may not be the one that would be written."""
    folder = saved(torch.float16)
    stamps = FolderParts(folder, ["unet"])._stamps
    if name.endswith(".json"):
        (folder / name).write_text((folder / name).read_text() + " ")
    else:
        change(folder / name, more=torch.zeros(1))
    monkeypatch.setattr("pipeline_folders.FolderParts", lambda *args: FolderParts(*args, stamps))
    with pytest.raises(BitPolicyError, match=f"{name.split('/')[1]} was written to while .*run the command again"):
        export(exported, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
