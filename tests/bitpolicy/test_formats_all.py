"""Every format and every quantizer through the whole workflow: searched, stored, exported and read back, bit for
bit."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import bitpolicy
from bitpolicy import BitPolicyError, Policy
from bitpolicy.kernels.formats.named import FP16
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.kernels.quantizers.named import HESSIANS, QUANTIZERS
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.calibration import RoundedKey
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.calibration_file import load_calibration
from bitpolicy.sensitivity.records import Records
from bitpolicy.sensitivity.rounding import rounding_pass
from bitpolicy.sensitivity.rounding.kept_rounding import write_rounded
from bitpolicy.sensitivity.samples import split_samples
from bitpolicy.sensitivity.table_files import read_table
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

CALL = {"num_inference_steps": 1, "guidance_scale": 1.0}
PROMPTS = "cat dog pizza heart star moon tree ball".split()
SIZES = {"calibration_samples": 2, "vectors": 2, "search_samples": 2, "confirm_samples": 1, "held_out_samples": 1}
SAMPLES = split_samples(["a red heart", "pizza"], 2, seed=77)
UNET = Path("unet/diffusion_pytorch_model.safetensors")
NewPipeline = Callable[[], Any]


def search(pipe: Any, budget: str = "28%", **more: Any) -> Policy:
    given = {"call": CALL, "prompts": PROMPTS, "trials": 0, "quiet": True, **SIZES}
    chosen = {"formats": "int3,int4-rot,int8", "quantizer": "auto"}
    return bitpolicy.search(pipe, budget, **{**given, **chosen, **more})


def draw(pipe: Any) -> torch.Tensor:
    return torch.stack([image for image, _ in Trajectories(pipe, ["unet"], CALL).images(SAMPLES)])


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass(frozen=True)
class Searched:
    """A finished search: its policy, the layers' choices, and its folder with the checkpoint in it."""

    policy: Policy
    choices: dict[str, Choice]
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"


@pytest.fixture(scope="module")
def auto(half_pipeline: NewPipeline, layer_names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """Three formats, every quantizer."""
    folder = tmp_path_factory.mktemp("auto")
    policy = search(half_pipeline(), output_dir=folder)
    bitpolicy.export(half_pipeline(), policy, folder / "checkpoint")
    return Searched(policy, policy.resolve(layer_names), folder)


@pytest.fixture(scope="module")
def every(half_pipeline: NewPipeline, layer_names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """All formats, rounded to nearest."""
    folder = tmp_path_factory.mktemp("every")
    policy = search(half_pipeline(), formats="all", quantizer="rtn", output_dir=folder)
    bitpolicy.export(half_pipeline(), policy, folder / "checkpoint")
    return Searched(policy, policy.resolve(layer_names), folder)


@pytest.fixture(params=["auto", "every"])
def searched(request: pytest.FixtureRequest) -> Searched:
    return request.getfixturevalue(request.param)


def test_reloaded_checkpoints_draw_the_images_of_the_search(half_pipeline: NewPipeline, searched: Searched) -> None:
    pipe = half_pipeline()
    reference = draw(pipe)
    assert searched.policy.calibration is not None
    with quantized(pipe.unet, searched.choices, quantization=Quantization(calibration=searched.policy.calibration)):
        expected = draw(pipe)
    found = draw(bitpolicy.load_pipeline(searched.checkpoint, torch.float32))
    assert torch.equal(found, expected)
    assert not torch.equal(found, reference)


def test_the_bytes_fit_and_use_the_budget(searched: Searched) -> None:
    assert searched.policy.result is not None
    assert searched.policy.budget is not None
    on_disk = sum(tensor.nbytes for tensor in load_file(searched.checkpoint / UNET).values())
    assert 0.9 * searched.policy.budget.bytes < on_disk <= searched.policy.budget.bytes
    assert on_disk == searched.policy.result.policy_bytes


def test_no_layer_has_a_format_that_does_not_fit(half_pipeline: NewPipeline, searched: Searched) -> None:
    layers = dict(quantizable_layers(half_pipeline().unet))
    assert all(choice.format.fits(layers[name].weight.shape) for name, choice in searched.choices.items())


def test_a_policy_and_its_file_export_the_same(half_pipeline: NewPipeline, searched: Searched, tmp_path: Path) -> None:
    bitpolicy.export(half_pipeline(), searched.folder / "policy.yaml", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(searched.checkpoint)


def test_a_finished_search_is_found_and_not_repeated(
    half_pipeline: NewPipeline, auto: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(auto.folder / "work", tmp_path / "work")
    monkeypatch.setattr(Trajectories, "differentiable_signal", lambda *_: pytest.fail("something was probed again"))
    again = search(half_pipeline(), output_dir=tmp_path)
    assert again.to_yaml() == auto.policy.to_yaml()
    for name in ("policy.yaml", "calibration.safetensors", "sensitivity.safetensors", "sensitivity.csv"):
        assert (tmp_path / name).read_bytes() == (auto.folder / name).read_bytes(), name


@pytest.mark.parametrize("at", ["conv_out", "sketch-1-0"])
def test_a_stopped_search_ends_as_if_it_had_never_stopped(
    half_pipeline: NewPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    wanted = {"budget": "40%", "formats": "int4,int8", "quantizer": "gptq-trajectory"}
    whole = search(half_pipeline(), output_dir=tmp_path / "whole", **wanted)
    put = Records.put

    def stopped(records: Records, name: str, tensors: Any) -> None:
        if name == at:
            raise KeyboardInterrupt
        put(records, name, tensors)

    monkeypatch.setattr(Records, "put", stopped)
    monkeypatch.setattr(rounding_pass, "write_rounded", partial(stopped_file, at))
    with pytest.raises(KeyboardInterrupt):
        search(half_pipeline(), output_dir=tmp_path / "parts", **wanted)
    monkeypatch.setattr(Records, "put", put)
    monkeypatch.setattr(rounding_pass, "write_rounded", write_rounded)
    resumed = search(half_pipeline(), output_dir=tmp_path / "parts", **wanted)
    assert resumed.to_yaml() == whole.to_yaml()
    for name in ("calibration.safetensors", "sensitivity.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def stopped_file(at: str, path: Path, specs: Any, tensors: Any) -> None:
    if path.stem == at:
        raise KeyboardInterrupt
    write_rounded(path, specs, tensors)


# Quantizers


def test_layers_have_the_quantizers_that_scored_best(auto: Searched, layer_names: list[str]) -> None:
    table = read_table(auto.folder / "sensitivity.safetensors")
    assert table.quantizers == QUANTIZERS
    for i, name in enumerate(layer_names):
        assert auto.choices[name] == table.choice(i, auto.choices[name].format)
    used = {choice.quantizer for choice in auto.choices.values() if choice.format.packed}
    assert used & set(HESSIANS)
    written = yaml.safe_load((auto.folder / "policy.yaml").read_text())
    assert written["provenance"]["probe"]["quantizer"] == "auto"


def test_the_calibration_keeps_what_the_policy_needs_and_no_more(auto: Searched, layer_names: list[str]) -> None:
    kept = load_calibration(auto.folder / "calibration.safetensors", auto.policy.provenance["calibration"])
    needed = {
        RoundedKey.of(name, choice, suffix)
        for name, choice in auto.choices.items()
        if choice.quantizer != "rtn"
        for suffix in choice.format.tensors((4, 64), torch.float16)
    }
    assert set(kept.input_means) == set(layer_names)
    assert set(kept.rounded) == needed
    assert kept.made_from == auto.policy.model.sha256


def test_the_checkpoint_contains_the_rounded_weights_unchanged(auto: Searched) -> None:
    kept = load_calibration(auto.folder / "calibration.safetensors")
    stored = load_file(auto.checkpoint / UNET)
    for key, tensor in kept.rounded.items():
        assert torch.equal(stored[f"{key.layer}.{key.suffix}"].view(torch.uint8), tensor.view(torch.uint8)), key
    assert len(kept.rounded) > 50


def test_without_its_calibration_a_policy_is_refused_with_the_remedy(
    half_pipeline: NewPipeline, auto: Searched, tmp_path: Path
) -> None:
    shutil.copy(auto.folder / "policy.yaml", tmp_path)
    with pytest.raises(BitPolicyError, match="keep the two together, or set bias_correction: false and quantizer: rtn"):
        bitpolicy.export(half_pipeline(), tmp_path / "policy.yaml", tmp_path / "out")
    layer = next(name for name, choice in auto.choices.items() if choice.quantizer in HESSIANS)
    assert auto.policy.calibration is not None
    rounded = {key: tensor for key, tensor in auto.policy.calibration.rounded.items() if key.layer != layer}
    lacking = replace(auto.policy.calibration, rounded=rounded)
    with pytest.raises(BitPolicyError, match=f"layer {layer} was rounded by gptq.*keep calibration.safetensors"):
        bitpolicy.export(half_pipeline(), auto.policy.with_calibration(lacking), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_quantizer_is_predicted_to_harm_less_than_rounding_to_nearest(
    half_pipeline: NewPipeline, auto: Searched
) -> None:
    nearest = search(half_pipeline(), quantizer="rtn").result
    assert auto.policy.result is not None
    assert nearest is not None
    assert auto.policy.result.predicted_error < 0.8 * nearest.predicted_error


def test_an_unknown_quantizer_is_refused_before_anything_is_drawn(
    half_pipeline: NewPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trajectories, "latents", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(BitPolicyError, match="unknown quantizer 'magic'; write any of rtn, mse, hqq, gptq"):
        search(half_pipeline(), quantizer="magic")


def test_the_command_takes_a_quantizer(command: Any, toy: Path, prompts: Path, tmp_path: Path) -> None:
    call = ("--num-inference-steps", "1", "--guidance-scale", "1", "--trials", "0", "--formats", "int4-sym,int8")
    where = ("--model", toy, "--prompts", prompts, "--output-dir", tmp_path / "out")
    outcome = command("--budget", "40%", *where, *call, "--quantizer", "gptq", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.result["policy_bytes"] == outcome.result["checkpoint_bytes"]
    assert yaml.safe_load((tmp_path / "out" / "policy.yaml").read_text())["defaults"]["quantizer"] == "gptq"


# Formats


def test_a_few_of_all_formats_are_probed_and_several_are_used(every: Searched) -> None:
    table = read_table(every.folder / "sensitivity.safetensors")
    assert 7 <= len(table.formats) <= 14
    used = {choice.format for choice in every.choices.values()}
    assert len(used) > 3
    assert used <= {*table.formats, FP16}


def test_more_formats_are_predicted_to_harm_less(half_pipeline: NewPipeline, every: Searched) -> None:
    usual = search(half_pipeline(), budget="32%", formats="int4,int8", quantizer="rtn").result
    many = search(half_pipeline(), budget="32%", formats="all", quantizer="rtn").result
    assert usual is not None
    assert many is not None
    assert many.predicted_error < usual.predicted_error


def test_a_budget_that_only_unsuitable_formats_would_meet_is_refused_before_anything_is_drawn(
    half_pipeline: NewPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    latents = Trajectories.latents
    monkeypatch.setattr(Trajectories, "latents", lambda *a: drawn.append("something") or latents(*a))
    with pytest.raises(BitPolicyError, match="below the smallest policy"):
        search(half_pipeline(), budget="20%", formats="int2-rot", quantizer="rtn")
    assert drawn == []
