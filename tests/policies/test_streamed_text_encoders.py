"""Text encoders are packed from their folder to the same files as from memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipeline_folders import TEXT, change, differing
from safetensors.torch import load_file, save_file
from toy_pipelines import TOYS

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.folder_parts import FolderParts, is_streamable
from bitpolicy.policies.checkpoints.parts import MemoryParts, Parts
from bitpolicy.policies.checkpoints.pipeline import export_parts
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.storage.source import source_hashes

F16 = torch.float16


def renamed(name: str, prefix: str) -> str:
    """As in CLIP's files, old and new, with and without `text_model.`; the projection never had this prefix."""
    return name if name.startswith("text_projection") else prefix + name.removeprefix("text_model.")


def unread(kind: Any, folder: Path) -> set[str]:
    """Names of the tensors that transformers itself misses and initializes at random."""
    return kind.from_pretrained(folder, output_loading_info=True)[1]["missing_keys"]


def names_of(parts: Parts) -> list[str]:
    return list(parts.target.layers)


@pytest.mark.parametrize("toy", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])  # CLIP; two CLIPs and a T5
@pytest.mark.parametrize("prefix", ["", "text_model."], ids=["newer names", "older names"])
def test_streamed_text_encoders_equal_those_written_from_memory(
    every_format_in_turn: Callable[[Any], dict[str, Choice]],
    policy_of: Callable[..., Policy],
    tmp_path: Path,
    toy: str,
    prefix: str,
) -> None:
    pipe = TOYS[toy].new()
    names = [name for name in ("unet", "transformer", "text_encoder", "text_encoder_3") if hasattr(pipe, name)]
    for name in names:
        to_storage(getattr(pipe, name), F16)
    pipe.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / TEXT
    stored = {renamed(name, prefix): tensor for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    if unread(type(pipe.text_encoder), file.parent):
        pytest.skip("the installed transformers does not read such names")
    memory = MemoryParts(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model"), names)
    choices = {name: Choice(choice.format) for name, choice in every_format_in_turn(memory.target).items()}
    policy = policy_of(memory.target, choices)
    assert is_streamable(tmp_path / "model", names)
    streamed = FolderParts(tmp_path / "model", names)
    assert {parameter.device.type for parameter in streamed.target.parameters()} == {"meta"}
    assert names_of(streamed) == names_of(memory)
    assert source_hashes(streamed.sources, F16) == policy.model.hashes
    export_parts(memory, policy, Calibration(), tmp_path / "from memory")
    export_parts(streamed, policy, Calibration(), tmp_path / "streamed")
    differ = differing(tmp_path / "from memory", tmp_path / "streamed")
    assert [name for name in differ if "tokenizer" not in name and name != "bitpolicy.json"] == []  # which lists them


def test_tensors_that_transformers_would_convert_are_not_streamed(
    new_toy_pipeline: Callable[[], Any], tmp_path: Path
) -> None:
    new_toy_pipeline().save_pretrained(tmp_path)
    found = load_file(tmp_path / TEXT)
    name = next(name for name in found if name.endswith("q_proj.weight"))
    save_file(found | {name.replace("q_proj", "qkv_proj"): found.pop(name)}, tmp_path / TEXT)
    assert not is_streamable(tmp_path, ["unet", "text_encoder"])
    assert is_streamable(tmp_path, ["unet"])
    with pytest.raises(
        BitPolicyError, match=r"do not hold .*q_proj.weight under one name; download them again, or load"
    ):
        FolderParts(tmp_path, ["text_encoder"])


def test_a_text_encoder_that_does_not_fit_its_config_is_refused(
    new_toy_pipeline: Callable[[], Any], tmp_path: Path
) -> None:
    new_toy_pipeline().save_pretrained(tmp_path)
    name = next(name for name in load_file(tmp_path / TEXT) if name.endswith("fc1.bias"))
    change(tmp_path / TEXT, **{name.replace(".", "__"): torch.zeros(3)})
    with pytest.raises(BitPolicyError, match=r"fc1\.bias has shape \(3,\), .*the config of CLIPTextModel says \(32,\)"):
        FolderParts(tmp_path, ["text_encoder"])
