"""--lora: the weights that images are drawn with are those that are scored, rounded and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import bitpolicy
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.loading import load_source
from bitpolicy.pipelines.lora import parsed
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.target import Target

SCALE = 0.5


@pytest.fixture(scope="module")
def lora(half_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, unet = tmp_path_factory.mktemp("lora"), half_pipeline().unet
    torch.manual_seed(2)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v", "conv1"]))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.fixture(scope="module")
def searched(
    command: Any, small: tuple[str, ...], lora: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("lora-search") / "out"
    words = ["--budget", "45%", *small, "--lora", f"{lora}:{SCALE}", "--output-dir", str(folder), "--json"]
    words[words.index("--trials") + 1] = "0"
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    return outcome, folder


def merged(toy: Path, lora: Path, scale: float = SCALE) -> Any:
    """The pipeline with the LoRA in it, by diffusers' own functions."""
    pipe = DiffusionPipeline.from_pretrained(toy, dtype=torch.float32)
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    return pipe


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in pipe.unet.state_dict().items()}


def test_weights_are_those_of_diffusers_rounded_once(toy: Path, lora: Path) -> None:
    found = load_source(str(toy), lora=[f"{lora}:{SCALE}"])
    expected = {name: tensor.half().float() for name, tensor in weights(merged(toy, lora)).items()}
    own = weights(found.pipe)
    assert own.keys() == expected.keys()
    assert [name for name in own if not torch.equal(own[name], expected[name])] == []
    plain = weights(DiffusionPipeline.from_pretrained(toy))
    changed = [name for name in own if not torch.equal(own[name], plain[name])]
    assert changed
    assert all("to_q" in name or "to_v" in name or "conv1" in name for name in changed)


def test_several_are_merged_in_order(toy: Path, lora: Path) -> None:
    twice = weights(load_source(str(toy), lora=[f"{lora}:0.25", f"{lora}:0.25"]).pipe)
    once = weights(load_source(str(toy), lora=[f"{lora}:0.5"]).pipe)
    for name, tensor in once.items():
        torch.testing.assert_close(twice[name], tensor, rtol=2e-3, atol=1e-6)


def test_the_checkpoint_draws_what_the_merged_pipeline_does(searched: Any, toy: Path, lora: Path) -> None:
    _, folder = searched
    policy = Policy.load(folder / "policy.yaml")
    assert policy.model.lora == (f"{lora}:{SCALE}",)
    source = load_source(str(toy), lora=policy.model.lora)
    target = source.target
    assert source.hashes == policy.model.hashes
    quantization = Quantization(calibration=policy.calibration)
    with quantized(target, policy.resolve(target.layers), quantization=quantization):
        expected = {name: layer.weight.detach().clone() for name, layer in target.layers.items()}
    packed = Target.of(bitpolicy.load_pipeline(folder / "checkpoint", torch.float32), ["unet"]).packed_layers
    assert packed
    for name, layer in packed.items():
        assert torch.equal(layer.dequantize(torch.float32), expected[name]), name


def test_export_and_eval_merge_what_the_policy_names(
    command: Any, searched: Any, toy: Path, prompts: Path, here: Path
) -> None:
    _, folder = searched
    again = here / "again"
    exported = command("export", "--policy", folder / "policy.yaml", "--model", toy, "--output-dir", again)
    assert exported.code == 0, exported.err
    denoiser = "unet/diffusion_pytorch_model.safetensors"
    assert (again / denoiser).read_bytes() == (folder / "checkpoint" / denoiser).read_bytes()
    evaluated = command("eval", again, "--prompts", prompts, "--images", "2", "--num-inference-steps", "2", "--json")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.result["psnr_db"]["mean"] > 20


def test_another_program_gets_the_merged_weights_too(command: Any, searched: Any, toy: Path, here: Path) -> None:
    _, folder = searched
    line = (
        "export",
        "--policy",
        folder / "policy.yaml",
        "--model",
        toy,
        "--target",
        "sdnq",
        "--output-dir",
        here / "s",
    )
    assert command(*line).code == 0


# Refusals


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("owner/name:-1", ("owner/name", -1.0)),
        ("C:\\style.safetensors", ("C:\\style.safetensors", 1.0)),
        ("a:b/c.safetensors", ("a:b/c.safetensors", 1.0)),
    ],
)
def test_a_scale_follows_a_colon(text: str, found: tuple[str, float]) -> None:
    assert parsed(text) == found


@pytest.mark.parametrize("text", ["", ":0.5", "a.safetensors:big", "a.safetensors:nan", "a.safetensors:inf"])
def test_a_wrong_scale_is_refused(text: str) -> None:
    with pytest.raises(BitPolicyError, match="FILE:SCALE"):
        parsed(text)


def test_files_that_do_not_fit_are_refused(command: Any, small: tuple[str, ...], lora: Path, here: Path) -> None:
    (here / "a.safetensors").write_bytes(lora.read_bytes()[:100])
    (here / "b.pt").write_bytes(b"pickle")
    for name, words in {
        "a.safetensors": "cannot merge --lora",
        "b.pt": "not a .safetensors file",
        "missing.safetensors": "there is no --lora",
        f"{lora}:0": "changes no weight",
    }.items():
        outcome = command("--budget", "45%", *small, "--lora", name, "--output-dir", here / "out")
        assert outcome.code == 2, name
        assert words in outcome.err, outcome.err
        assert not (here / "out").exists()


def test_a_pipeline_in_memory_takes_no_file(half_pipeline: Any, lora: Path) -> None:
    with pytest.raises(BitPolicyError, match="already in memory"):
        bitpolicy.search(half_pipeline(), "45%", lora=str(lora), trials=0, quiet=True)
