"""Text encoder, VAE and U-Net under one budget: from the command line to images of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

import bitpolicy
from bitpolicy.kernels.layers import PackedLayer, quantizable_layers
from bitpolicy.policies.apply import pack
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.calibration_file import load_calibration
from bitpolicy.policies.target import Target

NAMES = ("unet", "text_encoder", "vae")
BUDGET = "45%"


@pytest.fixture(scope="module")
def whole(command: Any, small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished search over three components: its outcome and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    options = ("--component", ",".join(NAMES), "--budget", BUDGET, "--output-dir", folder, "--trials", "0", "--json")
    outcome = command("search", *small[:-2], *options)
    assert outcome.code == 0, outcome.err
    return outcome, folder


def on_disk(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    return {name: load_file(folder / name / f"{file}.safetensors") for name, file in files.items()}


def tensor_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensors in on_disk(folder).values() for tensor in tensors.values())


def test_predicted_bytes_match_the_disk_and_fit_the_budget(whole: Any, toy: Path) -> None:
    outcome, folder = whole
    result = outcome.result
    assert result["policy_bytes"] == result["checkpoint_bytes"] == tensor_bytes(folder / "checkpoint")
    assert result["reference_bytes"] == tensor_bytes(toy)
    assert result["budget_bytes"] == result["reference_bytes"] * 45 // 100 >= result["policy_bytes"]
    assert result["error_of"] == "image"


def test_every_component_is_compressed(whole: Any) -> None:
    packed = {name.split(".")[0] for name, choice in choices_of(whole[1]).items() if choice.format.packed}
    assert packed == set(NAMES)


def choices_of(folder: Path) -> Any:
    policy = Policy.load(folder / "policy.yaml")
    pipe = DiffusionPipeline.from_pretrained(folder / "checkpoint")
    parts = {name: getattr(pipe, name) for name in NAMES}
    layers = [
        f"{part}.{name}" for part, model in parts.items() for name, module in model.named_modules() if layer(module)
    ]
    return policy.resolve(layers)


def layer(module: nn.Module) -> bool:
    return isinstance(module, PackedLayer) or type(module) in (nn.Linear, nn.Conv2d)


def test_the_checkpoint_draws_the_images_of_the_policy_in_memory(whole: Any, toy: Path) -> None:
    folder = whole[1]
    reloaded = DiffusionPipeline.from_pretrained(folder / "checkpoint", torch_dtype=torch.float32)
    assert sum(isinstance(m, PackedLayer) for n in NAMES for m in getattr(reloaded, n).modules()) > 50
    ours = DiffusionPipeline.from_pretrained(toy, torch_dtype=torch.float32)
    choices = choices_of(folder)
    calibration = load_calibration(folder / "calibration.safetensors")
    target, quantization = Target.of(ours, NAMES), Quantization(calibration=calibration)
    for name, model in target.items():
        own = target.of_component(choices, name)
        pack(model, own, quantization=quantization.of_component(name, target.names))
    assert torch.equal(drawn(reloaded), drawn(ours))
    assert not torch.equal(drawn(reloaded), drawn(DiffusionPipeline.from_pretrained(toy, torch_dtype=torch.float32)))


def drawn(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(1)
    return pipe("a cat", num_inference_steps=2, guidance_scale=1.0, generator=seed, output_type="pt").images


def test_layers_that_no_sample_calls_stay_fp16_and_are_reported(whole: Any) -> None:
    outcome, folder = whole
    choices = choices_of(folder)
    silent = {name for name in choices if name.startswith(("vae.encoder.", "vae.quant_conv"))}
    assert {choices[name].format.name for name in silent} == {"fp16"}
    assert any(choices[name].format.packed for name in choices if name.startswith("vae.decoder."))
    assert f"no calibration sample calls {len(silent)} layers, e.g. vae.encoder." in outcome.err
    assert Policy.load(folder / "policy.yaml").provenance["probe"]["never_called"] == len(silent)


def test_a_budget_without_room_for_uncalled_layers_is_explained(
    command: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    """This is known only after a sample was drawn."""
    outcome = command("search", *small, "--component", "vae", "--budget", "40%", "--output-dir", tmp_path / "out")
    needles = ("below the smallest policy", "no calibration sample calls 17 layers", "--keep 'GLOB=FORMAT'")
    outcome.assert_refused("bitpolicy", *needles)


def test_a_pin_takes_precedence_over_fp16_for_uncalled_layers(half_pipeline: Any) -> None:
    policy = bitpolicy.search(
        half_pipeline(),
        "60%",
        component="vae",
        call={"num_inference_steps": 1, "guidance_scale": 1.0},
        prompts=["cat"],
        trials=0,
        vectors=1,
        calibration_samples=1,
        keep=("encoder.*=int8",),
        quiet=True,
    )
    names = [name for name, _ in quantizable_layers(half_pipeline().vae)]
    found = policy.resolve(names)
    assert {found[name].format.name for name in names if name.startswith("encoder.")} == {"int8"}
    assert found["quant_conv"].format.name == "fp16"


def test_exporting_the_policy_again_writes_the_same_files(whole: Any, toy: Path, tmp_path: Path) -> None:
    folder = whole[1]
    pipe = DiffusionPipeline.from_pretrained(toy, torch_dtype=torch.float32)
    nbytes = bitpolicy.export(pipe, folder / "policy.yaml", tmp_path / "again")
    assert nbytes == tensor_bytes(folder / "checkpoint")
    for name, tensors in on_disk(tmp_path / "again").items():
        before = on_disk(folder / "checkpoint")[name]
        assert all(torch.equal(tensor, before[key]) for key, tensor in tensors.items())
        assert tensors.keys() == before.keys()


def test_eval_and_inspect_cover_all_packed_components(whole: Any, toy: Path, command: Any, prompts: Path) -> None:
    folder = whole[1]
    shown = command("inspect", folder / "checkpoint", "--json").result["layers"]
    assert {row["layer"].split(".")[0] for row in shown} == set(NAMES)
    assert {row["stage"] for row in shown} > {"conditioning", "autoencoder"}
    call = ("--num-inference-steps", "2", "--guidance-scale", "1", "--images", "2", "--prompts", prompts)
    quality = command("eval", folder / "checkpoint", "--model", toy, *call, "--json").result
    ours = drawn(DiffusionPipeline.from_pretrained(folder / "checkpoint", torch_dtype=torch.float32))
    error = (ours - drawn(DiffusionPipeline.from_pretrained(toy, torch_dtype=torch.float32))).square().mean()
    assert quality["psnr_db"]["mean"] == pytest.approx(float(-10 * error.log10()), abs=12)


def test_the_card_and_the_policy_name_the_components(whole: Any) -> None:
    folder = whole[1]
    card = (folder / "checkpoint" / "README.md").read_text()
    assert "`unet`, `text_encoder` and `vae`" in card
    assert "predicted relative error of the images" in card
    assert Policy.load(folder / "policy.yaml").model.component == ",".join(NAMES)
    for name in NAMES:
        config = json.loads((folder / "checkpoint" / name / "config.json").read_text())
        assert config["quantization_config"]["layers"]


@pytest.mark.parametrize("quantizer", ["auto", "gptq-trajectory"])
def test_quantizers_that_calibrate_work_outside_the_loop(half_pipeline: Any, quantizer: str) -> None:
    table = bitpolicy.probe(
        half_pipeline(),
        component="all",
        quantizer=quantizer,
        formats="int4,fp16",
        call={"num_inference_steps": 1, "guidance_scale": 1.0},
        prompts=["cat"],
        samples=1,
        vectors=1,
        quiet=True,
    )
    assert {name.split(".")[0] for name in table.layers} == set(NAMES)
    outside = [i for i, name in enumerate(table.layers) if name.startswith(("vae.decoder.", "text_encoder."))]
    assert (table.error[outside] > 0).all()
    assert torch.isfinite(table.error).all()


@pytest.mark.parametrize("scope", ["pipeline", "peak"])
def test_a_wider_scope_counts_packed_components_once(
    command: Any, small: tuple[str, ...], scope: str, tmp_path: Path
) -> None:
    """Only a text encoder's buffer of positions is left over; it is in memory and in no file."""
    call = ("--component", "all", "--budget", "80%", "--scope", scope, "--output-dir", tmp_path / "out", "--dry-run")
    outcome = command("search", *small, *call)
    assert outcome.code == 0, outcome.err
    assert f"the other models take {0 if scope == 'pipeline' else 128} " in outcome.out.replace(",", " ")
    assert "for the vae, text_encoder and unet" in outcome.out
