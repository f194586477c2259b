"""The Python API end to end on a pipeline in memory: search, export and load, with the same bits as in the search."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bitpolicy
from bitpolicy import BitPolicyError, Policy
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.pipelines.loading import load_source
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.apply import pack, quantized
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.samples import split_samples
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

CALL = {"num_inference_steps": 2, "guidance_scale": 3.0}
PROMPTS = "cat dog pizza heart star moon tree ball".split()
SMALL = {"calibration_samples": 2, "vectors": 1, "search_samples": 4, "confirm_samples": 2, "held_out_samples": 2}
SAMPLES = split_samples(["a red heart", "pizza"], 3, seed=77)
UNET = Path("unet/diffusion_pytorch_model.safetensors")
NewPipeline = Callable[[], Any]


def search(pipe: Any, budget: str = "40%", **more: Any) -> Policy:
    return bitpolicy.search(
        pipe, budget, **{"call": CALL, "prompts": PROMPTS, "trials": 2, "quiet": True, **SMALL, **more}
    )


def draw(pipe: Any) -> torch.Tensor:
    return torch.stack([image for image, _ in Trajectories(pipe, ["unet"], CALL).images(SAMPLES)])


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def policy(half_pipeline: NewPipeline) -> Policy:
    return search(half_pipeline())


@pytest.fixture(scope="module")
def exported(half_pipeline: NewPipeline, policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "checkpoint"
    nbytes = bitpolicy.export(half_pipeline(), policy, folder)
    assert policy.result is not None
    assert nbytes == policy.result.policy_bytes
    return folder


# Bytes


def test_the_checkpoint_has_the_bytes_of_the_policy_within_the_budget(policy: Policy, exported: Path) -> None:
    assert policy.result is not None
    assert policy.budget is not None
    on_disk = sum(tensor.nbytes for tensor in load_file(exported / UNET).values())
    assert on_disk == policy.result.policy_bytes <= policy.budget.bytes
    file = (exported / UNET).stat().st_size
    header = int.from_bytes((exported / UNET).read_bytes()[:8], "little")
    assert file == 8 + header + on_disk


def test_the_budget_is_the_requested_share_of_fp16(policy: Policy, half_pipeline: NewPipeline) -> None:
    assert policy.budget is not None
    reference = ByteAccount.of(Target({"unet": half_pipeline().unet}), torch.float16).reference
    assert reference == 2 * sum(parameter.numel() for parameter in half_pipeline().unet.parameters())
    assert policy.budget.bytes == reference * 40 // 100


def test_a_policy_mixes_formats(policy: Policy, layer_names: list[str]) -> None:
    found = {choice.format.name for choice in policy.resolve(layer_names).values()}
    assert len(found) > 1


# Bits


def test_a_reloaded_checkpoint_draws_the_images_of_the_quantized_model_in_memory(
    half_pipeline: NewPipeline, policy: Policy, exported: Path, layer_names: list[str]
) -> None:
    pipe, choices = half_pipeline(), policy.resolve(layer_names)
    reference = draw(pipe)
    assert policy.calibration is not None
    with quantized(pipe.unet, choices, quantization=Quantization(calibration=policy.calibration)):
        expected = draw(pipe)
    found = draw(bitpolicy.load_pipeline(exported, torch.float32))
    assert torch.equal(found, expected)
    assert not torch.equal(found, reference)
    assert torch.equal(draw(pipe), reference)


def test_loading_without_a_dtype_keeps_the_storage_dtype(exported: Path) -> None:
    pipe = bitpolicy.load_pipeline(exported)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float16}
    assert torch.isfinite(draw(pipe)).all()


def test_loading_passes_no_deprecated_argument(exported: Path, toy: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        bitpolicy.load_pipeline(exported, torch.float32)
        load_source(str(toy), dtype="float32")


def test_loading_onto_a_device(exported: Path) -> None:
    assert bitpolicy.load_pipeline(exported, device="cpu").device == torch.device("cpu")


@pytest.mark.parametrize("what", ["nothing", "a pipeline's unet"])
def test_loading_anything_but_a_pipeline_is_refused(exported: Path, tmp_path: Path, what: str) -> None:
    folder = exported / "unet" if "unet" in what else tmp_path / what
    with pytest.raises(BitPolicyError, match="not a diffusers pipeline folder"):
        bitpolicy.load_pipeline(folder)


# Search


def test_equal_searches_give_equal_policies(half_pipeline: NewPipeline, policy: Policy) -> None:
    again = search(half_pipeline())
    assert again.to_yaml() == policy.to_yaml()
    assert again.calibration is not None
    assert policy.calibration is not None
    same = again.calibration.tensors()
    assert all(torch.equal(same[name], tensor) for name, tensor in policy.calibration.tensors().items())


def test_another_seed_probes_other_samples(half_pipeline: NewPipeline, policy: Policy) -> None:
    other = search(half_pipeline(), seed=1)
    assert other.provenance["calibration"] != policy.provenance["calibration"]


def test_without_trials_the_policy_is_the_exact_solution(half_pipeline: NewPipeline) -> None:
    found = search(half_pipeline(), trials=0)
    assert found.provenance["search"] == {
        "trials": 0,
        "exact_gap": found.provenance["search"]["exact_gap"],
        "finalists": [],
        "won": "the exact solution",
    }
    assert found.provenance["search"]["exact_gap"] <= 1e-3


def test_a_larger_budget_is_predicted_to_harm_less(half_pipeline: NewPipeline) -> None:
    errors = []
    for budget in ("30%", "45%", "70%"):
        result = search(half_pipeline(), budget, trials=0).result
        assert result is not None
        errors.append(result.predicted_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[2]


def test_a_search_in_a_folder_resumes_there(
    half_pipeline: NewPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(half_pipeline(), output_dir=tmp_path / "kept")
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert {"policy.yaml", "calibration.safetensors", "sensitivity.csv", "study.journal", "work"} <= names
    monkeypatch.setattr(Trajectories, "differentiable_signal", lambda *_: pytest.fail("a sample was probed again"))
    assert search(half_pipeline(), output_dir=tmp_path / "kept").to_yaml() == first.to_yaml()


def test_a_budget_above_fp16_needs_no_search(half_pipeline: NewPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trajectories, "latents", lambda *_: pytest.fail("something was drawn"))
    found = search(half_pipeline(), "1GB")
    assert found.defaults.format == "fp16"
    assert found.layers == {}
    assert found.result is not None
    assert found.result.predicted_error == 0.0


def test_a_search_leaves_the_pipeline_as_it_found_it(half_pipeline: NewPipeline) -> None:
    pipe = half_pipeline()
    reference = draw(pipe)
    flags = {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()}
    search(pipe)
    assert torch.equal(draw(pipe), reference)
    assert {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


def test_bfloat16_is_stored_as_bfloat16(half_pipeline: NewPipeline, tmp_path: Path) -> None:
    pipe = half_pipeline()
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        torch.nn.Module.to(model, torch.bfloat16)
    found = search(pipe, trials=0)
    assert found.storage_dtype == "bfloat16"
    bitpolicy.export(pipe, found, tmp_path / "out")
    stored = {tensor.dtype for tensor in load_file(tmp_path / "out" / UNET).values() if tensor.is_floating_point()}
    assert torch.bfloat16 in stored
    assert bitpolicy.load_pipeline(tmp_path / "out").unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "three"}, "not a size"),
        ({"budget": "1%"}, "below the smallest policy"),
        ({"formats": "int9"}, "unknown format 'int9'"),
        ({"probe": "magic"}, "unknown probe 'magic'"),
        ({"component": "decoder"}, "no component 'decoder'"),
        ({"call": {"steps": 2}}, "does not take steps"),
        ({"calibration_samples": 0}, "at least 1"),
    ],
)
def test_mistakes_raise_one_family_of_errors(
    half_pipeline: NewPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BitPolicyError, match=message):
        search(half_pipeline(), **arguments)


def test_default_prompts_are_the_built_in_ones(half_pipeline: NewPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    latents = Trajectories.latents

    def noted(this: Trajectories, samples: Any) -> Any:
        samples = list(samples)
        drawn.extend(sample.prompt for sample in samples)
        return latents(this, samples)

    monkeypatch.setattr(Trajectories, "latents", noted)
    search(half_pipeline(), prompts=None, trials=0)
    built_in = (Path(bitpolicy.__file__).parent / "prompts" / "general.txt").read_text().splitlines()
    assert drawn
    assert set(drawn) <= set(built_in)


def test_a_fully_packed_model_is_refused(half_pipeline: NewPipeline, exported: Path) -> None:
    pipe = half_pipeline()
    pack(
        pipe.unet,
        {n: Choice(format_named("int8")) for n, _ in quantizable_layers(pipe.unet)},
        quantization=Quantization(),
    )
    with pytest.raises(BitPolicyError, match=r"packed.*full-precision"):
        search(pipe)


def test_a_partly_packed_model_is_refused(exported: Path) -> None:
    with pytest.raises(BitPolicyError, match=r"(quantized|packed).*full-precision"):
        search(bitpolicy.load_pipeline(exported, torch.float32), "99.9%")


# Probe


def test_a_probe_returns_the_table(half_pipeline: NewPipeline, layer_names: list[str]) -> None:
    table = bitpolicy.probe(half_pipeline(), call=CALL, prompts=PROMPTS, samples=2, vectors=1, quiet=True)
    assert list(table.layers) == layer_names
    assert [format.name for format in table.formats] == ["int4", "int8"]
    assert (table.error >= 0).all()
    assert table.additive_error([format_named("int8")] * 83) is not None


def test_the_weight_probe_draws_only_the_reference(half_pipeline: NewPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trajectories, "differentiable_signal", lambda *_: pytest.fail("a gradient was taken"))
    table = bitpolicy.probe(half_pipeline(), call=CALL, prompts=PROMPTS, samples=1, probe="weight", quiet=True)
    assert table.additive_error([format_named("int8")] * 83) is None


# Export


def test_a_policy_in_a_file_exports_to_the_same_bytes(half_pipeline: NewPipeline, tmp_path: Path) -> None:
    """The checkpoint's copy of the policy, with the calibration in the same folder, if the calibration does not contain
    the weights again."""
    bitpolicy.export(half_pipeline(), search(half_pipeline(), quantizer="rtn"), tmp_path / "once")
    bitpolicy.export(half_pipeline(), tmp_path / "once" / "policy.yaml", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "once")


def test_exporting_twice_gives_the_same_bytes(
    half_pipeline: NewPipeline, policy: Policy, exported: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        bitpolicy.export(half_pipeline(), policy, tmp_path / "again", overwrite=True)
        assert digests(tmp_path / "again") == digests(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_policy_for_another_model_is_refused(half_pipeline: NewPipeline, policy: Policy, tmp_path: Path) -> None:
    other = half_pipeline()
    other.unet.conv_out.weight.data[0, 0, 0, 0] += 1
    with pytest.raises(
        BitPolicyError, match=r"the policy was made for .* give that model, or give this one the policy's"
    ):
        bitpolicy.export(other, policy, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_policy_without_its_calibration_is_refused_with_the_remedy(
    half_pipeline: NewPipeline, policy: Policy, tmp_path: Path
) -> None:
    policy.save(tmp_path / "policy.yaml")
    (tmp_path / "calibration.safetensors").unlink()
    with pytest.raises(BitPolicyError, match=r"calibration\.safetensors .* keep the two together"):
        bitpolicy.export(half_pipeline(), tmp_path / "policy.yaml", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["policy.yaml"]


def test_a_policy_that_corrects_no_bias_needs_no_calibration(
    half_pipeline: NewPipeline, policy: Policy, tmp_path: Path, layer_names: list[str]
) -> None:
    plain = {name: Choice(choice.format) for name, choice in policy.resolve(layer_names).items()}
    Policy.of(plain, model=policy.model).save(tmp_path / "policy.yaml")
    nbytes = bitpolicy.export(half_pipeline(), tmp_path / "policy.yaml", tmp_path / "out")
    assert policy.result is not None
    assert nbytes == policy.result.policy_bytes
    assert not (tmp_path / "out" / "calibration.safetensors").exists()


def test_an_interrupted_export_leaves_the_folder_unchanged(
    half_pipeline: NewPipeline, policy: Policy, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bitpolicy.export(half_pipeline(), policy, tmp_path / "out")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitpolicy.policies.checkpoints.pipeline.describe_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        bitpolicy.export(half_pipeline(), policy, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert digests(tmp_path / "out") == digests(exported)


def test_an_export_keeps_files_that_it_did_not_write(
    half_pipeline: NewPipeline, policy: Policy, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with suppress(BitPolicyError):
        bitpolicy.export(half_pipeline(), policy, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_an_export_leaves_the_pipeline_as_it_found_it(new_toy_pipeline: NewPipeline, tmp_path: Path) -> None:
    pipe = new_toy_pipeline()
    found = search(pipe, trials=0)
    before = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    bitpolicy.export(pipe, found, tmp_path / "out")
    assert [name for name, tensor in pipe.vae.state_dict().items() if not torch.equal(tensor, before[name])] == []
