"""Files with random damage either load as they were exported, or give an error that a person can read.

The damage is the same in every run. A few hundred files on the smallest U-Net that has a layer of each kind.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from damage import mutated_bytes, mutated_json
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from toy_pipelines import TOYS
from transformers import CLIPTextModel

from bitpolicy import BitPolicyError, Policy
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.checkpoints.component import export_component
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization

FILES, CONFIGS, POLICIES = 60, 60, 150
SECONDS = 30
READS_OF_DIFFUSERS = "Unable to load weights from checkpoint file"


class Subject(NamedTuple):
    kind: Any
    folder: Path
    file: str
    state: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["diffusers", "transformers"])
def subject(
    request: pytest.FixtureRequest,
    every_format_in_turn: Callable[[nn.Module], dict[str, Choice]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Subject:
    if request.param == "diffusers":
        torch.manual_seed(0)
        model: Any = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=4,
        )
        file = "diffusion_pytorch_model.safetensors"
    else:
        model, file = TOYS["StableDiffusionPipeline"].new().text_encoder, "model.safetensors"
        assert type(model) is CLIPTextModel
    to_storage(model, torch.float16)
    choices = {name: Choice(choice.format) for name, choice in every_format_in_turn(model).items()}
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    export_component(model, choices, folder, quantization=Quantization())
    return Subject(type(model), folder, file, type(model).from_pretrained(folder).state_dict())


def mutated_tensors(tensors: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """A valid file again, with other names, shapes, dtypes or values."""
    found = dict(tensors)
    a, b = draw.sample(sorted(found), 2)
    match draw.randrange(6):
        case 0:
            del found[a]
        case 1:
            found[a], found[b] = found[b], found[a]
        case 2:
            found[a] = found[a].to(draw.choice((torch.float32, torch.float64, torch.int8, torch.uint8, torch.bfloat16)))
        case 3:
            found[a] = found[a].reshape(-1)
        case 4:
            found[a] = torch.full_like(found[a].float(), float("nan")).to(found[a].dtype)
        case _:
            found[f"{a}.{draw.randrange(9)}"] = found[b].clone()
    return {name: tensor.contiguous() for name, tensor in found.items()}


def require_same_or_refused(subject: Subject, folder: Path, what: str) -> bool:
    """Whether it loaded; raises if it loaded as something else, or failed with an error that has no message of ours."""
    try:
        found = subject.kind.from_pretrained(folder).state_dict()
    except BitPolicyError:
        return False
    except OSError as error:  # diffusers reads a single file before it asks us, and wraps safetensors' error
        if READS_OF_DIFFUSERS in str(error) and subject.file in str(error):
            return False
        raise
    assert found.keys() == subject.state.keys(), what
    odd = [n for n, t in found.items() if t.dtype != subject.state[n].dtype or not torch.equal(t, subject.state[n])]
    assert not odd, f"{what}: {odd} are other values"
    return True


@pytest.mark.parametrize("damage", ["bytes", "tensors", "config"])
def test_a_damaged_checkpoint_is_the_same_or_refused(subject: Subject, tmp_path: Path, damage: str) -> None:
    draw, began, loaded = random.Random(f"{subject.file}{damage}"), time.process_time(), 0
    file, config = tmp_path / "copy" / subject.file, tmp_path / "copy" / "config.json"
    whole, tensors = (subject.folder / subject.file).read_bytes(), load_file(subject.folder / subject.file)
    settings = json.loads((subject.folder / "config.json").read_text())
    count = CONFIGS if damage == "config" else FILES
    shutil.copytree(subject.folder, tmp_path / "copy")
    for i in range(count):
        if damage == "bytes":
            file.write_bytes(mutated_bytes(whole, draw))
        elif damage == "tensors":
            save_file(mutated_tensors(tensors, draw), file, metadata={"format": "pt"})
        else:
            ours = mutated_json(settings["quantization_config"], draw)
            if not isinstance(ours, dict) or ours.get("quant_method") != "bitpolicy":
                continue  # then no library asks us
            config.write_text(json.dumps(settings | {"quantization_config": ours}))
        loaded += require_same_or_refused(subject, tmp_path / "copy", f"{damage} {i}")
    assert loaded < count / 2, "the damage did none"
    assert time.process_time() - began < SECONDS


def test_a_damaged_policy_is_refused_or_read(exported: Any, tmp_path: Path) -> None:
    """A policy that is read gives every layer a choice. The error for another names the file or the wrong entry."""
    draw, path, began, refused = random.Random("policy"), tmp_path / "policy.yaml", time.process_time(), 0
    whole = exported.policy.to_yaml().encode()
    for i in range(POLICIES):
        data = mutated_bytes(whole, draw) if i % 2 else _mutated_lines(whole, draw)
        path.write_bytes(data)
        try:
            found = Policy.load(path).resolve(exported.choices)
        except BitPolicyError:
            refused += 1
            continue
        assert found.keys() == exported.choices.keys()
    assert POLICIES / 4 < refused < POLICIES
    assert time.process_time() - began < SECONDS


def _mutated_lines(data: bytes, draw: random.Random) -> bytes:
    """The text with one line removed, repeated, indented differently or given another value."""
    lines = data.decode().splitlines()
    at = draw.randrange(len(lines))
    value = draw.choice(["[]", "{}", "null", "1e999", "-1", "&a b", "*a", "!!python/name:os.system x", "'", "int99"])
    match draw.randrange(4):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, draw.choice(lines))
        case 2:
            lines[at] = " " + lines[at]
        case _:
            lines[at] = f"{lines[at].split(':')[0]}: {value}"
    return "\n".join(lines).encode()
