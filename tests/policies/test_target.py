"""The components under study, as one object, and as text in files and on the command line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from toy_pipelines import TOYS

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.components import asked_components, from_text, to_text
from bitpolicy.policies.identity import config_hash, weights_hash
from bitpolicy.policies.lazy import layer_prefix, within_component
from bitpolicy.policies.policy_records import ModelReference
from bitpolicy.policies.target import Target

F16 = torch.float16


def small(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 3), nn.GroupNorm(1, 3), nn.Conv2d(3, width, 1))


def test_a_single_component_keeps_the_names_of_its_layers() -> None:
    model = small(2)
    target = Target({"unet": model})
    assert dict(target.layers) == {"0": model[0], "2": model[2]}
    assert dict(target.named_modules()) == dict(model.named_modules())
    assert list(target.state_dict()) == list(model.state_dict())


def test_names_in_several_components_are_those_of_a_module_dict() -> None:
    models = {"unet": small(2), "vae": small(4)}
    target, together = Target(models), nn.ModuleDict(models)
    assert list(target.layers) == ["unet.0", "unet.2", "vae.0", "vae.2"]
    assert dict(target.named_modules()) == {name: m for name, m in together.named_modules() if name}
    assert list(target.state_dict()) == list(together.state_dict())
    assert [*map(id, target.parameters())] == [*map(id, together.parameters())]


def test_shared_modules_appear_once_and_layers_with_shared_weights_do_not() -> None:
    whole, weight = nn.Linear(2, 2), nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    other.weight = weight.weight
    target = Target({"one": nn.Sequential(whole, weight), "two": nn.Sequential(whole, other)})
    assert list(target.layers) == ["one.0"]
    assert len(list(target.parameters())) == 5


def test_entries_of_one_component_have_its_own_names() -> None:
    target = Target({"unet": small(2), "unet_2": small(2)})
    by_layer = {name: name for name in target.layers}
    assert dict(target.of_component(by_layer, "unet")) == {"0": "unet.0", "2": "unet.2"}
    alone = Target({"unet": small(2)})
    assert alone.of_component(by_layer, "unet") is by_layer
    assert within_component(by_layer, layer_prefix("unet_2", ["unet", "unet_2"]))["0"] == "unet_2.0"


def test_components_in_the_loop_are_separated_from_the_others() -> None:
    pipe = TOYS["StableDiffusionPipeline"].new()
    target = Target.of(pipe, ["text_encoder", "unet", "vae"])
    assert (list(target.in_loop), list(target.outside_loop)) == (["unet"], ["text_encoder", "vae"])
    assert target.in_words == "text_encoder, unet and vae"
    assert Target.of(pipe, ["vae"]).in_words == "vae"
    assert Target.of(pipe, ["unet"]).in_words == "denoiser"


def test_all_is_every_component_with_layers() -> None:
    pipe: Any = TOYS["StableDiffusionPipeline"].new()
    assert sorted(Target.chosen(pipe, ["all"])) == ["text_encoder", "unet", "vae"]
    assert Target.chosen(pipe).names == ["unet"]
    assert Target.chosen(pipe, ["vae", "unet"]).names == ["vae", "unet"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tokenizer", "no component 'tokenizer'; it has .*unet.*--component"),
        ("safety_checker", "does not change the image; leave it out of --component"),
        ("plain", "is a Linear, which neither diffusers nor transformers can save and load"),
    ],
)
def test_a_component_that_cannot_be_studied_is_refused(name: str, reason: str) -> None:
    models = {"unet": nn.Linear(1, 1), "safety_checker": nn.Linear(1, 1), "plain": nn.Linear(1, 1)}
    pipe: Any = SimpleNamespace(**models, components=models)
    with pytest.raises(BitPolicyError, match=reason):
        Target.chosen(pipe, [name])


def test_the_command_line_names_components_in_one_text() -> None:
    assert asked_components("unet, vae,unet") == ["unet", "vae"]
    assert asked_components("all") == ["all"]
    assert asked_components(None) is None


def test_a_policy_records_an_entry_for_each_component() -> None:
    pipe = TOYS["StableDiffusionPipeline"].new()
    target = Target.of(pipe, ["unet", "vae"])
    reference = ModelReference.of(target, target.weights_hashes(F16), "toy", "main")
    assert reference.model_dump(by_alias=True, exclude_none=True) == {
        "id": "toy",
        "revision": "main",
        "component": "unet,vae",
        "class": "UNet2DConditionModel,AutoencoderKL",
        "sha256": f"{weights_hash(pipe.unet, F16)},{weights_hash(pipe.vae, F16)}",
        "config": f"{config_hash(pipe.unet)},{config_hash(pipe.vae)}",
    }
    assert reference.hashes == target.weights_hashes(F16)
    assert reference.configs == target.config_hashes()
    assert from_text(to_text(target)) == reference.components == target.names
