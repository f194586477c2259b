"""The formats of a policy for one model, given to another with the same layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpolicy
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.target import Target

CALL = {"num_inference_steps": 2, "guidance_scale": 1}


def perturbed(pipe: Any) -> Any:
    """As a fine-tune is: other weights in the same layers."""
    draw = torch.Generator().manual_seed(3)
    for parameter in pipe.unet.parameters():
        moved = 0.1 * float(parameter.detach().std(correction=0)) * torch.randn(parameter.shape, generator=draw)
        parameter.data = (parameter.data + moved).half().float()
    return pipe


@pytest.fixture(scope="module")
def fine_tune(half_pipeline: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "fine-tune"
    pipe = perturbed(half_pipeline())
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        torch.nn.Module.to(model, torch.float16)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(finished: Any) -> Policy:
    return Policy.load(finished.folder / "policy.yaml")


def line(finished: Any, fine_tune: Path, folder: Path, *more: str) -> list[str]:
    """The finished search's line for the fine-tune, with the policy instead of the budget."""
    words = list(finished.arguments)
    words[words.index("--budget") : words.index("--budget") + 2] = ["--policy", str(finished.folder / "policy.yaml")]
    words[words.index("--model") + 1] = str(fine_tune)
    words[words.index("--output-dir") + 1] = str(folder)
    return [*words, *more]


@pytest.fixture(scope="module")
def moved(
    command: Any, finished: Any, fine_tune: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("transfer") / "out"
    outcome = command(*line(finished, fine_tune, folder))
    assert outcome.code == 0, outcome.err
    return outcome.result, folder


def test_formats_and_bias_corrections_are_the_policys(moved: Any, base: Policy, layer_names: list[str]) -> None:
    given, found = base.resolve(layer_names), Policy.load(moved[1] / "policy.yaml").resolve(layer_names)
    assert {name: choice.format for name, choice in found.items()} == {n: c.format for n, c in given.items()}
    corrected = [name for name, choice in found.items() if choice.bias_correction]
    assert len(corrected) > 0
    assert all(given[name].bias_correction for name in corrected)


def test_bytes_are_the_policys_and_the_result_says_what_it_had(moved: Any, base: Policy) -> None:
    result, _ = moved
    assert base.result is not None
    assert result["policy_bytes"] == result["checkpoint_bytes"] == base.result.policy_bytes
    assert result["given_policy"] == {"model": base.model.id, "psnr_db": base.result.psnr_db}
    assert base.model.id in result["chosen"]


def test_the_checkpoint_holds_the_fine_tunes_weights(moved: Any, fine_tune: Path) -> None:
    """The packed fine-tune differs from its own original less than half as much as from the base model."""
    _, folder = moved
    policy = Policy.load(folder / "policy.yaml")
    own = bitpolicy.load_pipeline(fine_tune, torch.float32)
    names = Target.chosen(own).layers
    before = {name: layer.weight.detach().clone() for name, layer in names.items()}
    reloaded = Target.of(bitpolicy.load_pipeline(folder / "checkpoint", torch.float32), ["unet"]).packed_layers
    assert reloaded
    with quantized(
        Target.chosen(own), policy.resolve(names), quantization=Quantization(calibration=policy.calibration)
    ):
        for name, layer in reloaded.items():
            weight = layer.dequantize(torch.float32) if hasattr(layer, "dequantize") else layer.weight
            assert torch.equal(weight, names[name].weight), name
            error = (weight - before[name]).norm() / before[name].norm()
            assert error < 0.2, name


def test_the_same_from_python(moved: Any, finished: Any, fine_tune: Path, prompts: Path) -> None:
    policy = bitpolicy.search(fine_tune, policy=finished.folder / "policy.yaml", call=CALL, prompts=prompts, quiet=True)
    written = Policy.load(moved[1] / "policy.yaml")
    assert (policy.layers, policy.defaults, policy.provenance["search"]) == (
        written.layers,
        written.defaults,
        written.provenance["search"],
    )
    assert policy.calibration is not None
    assert written.calibration is not None
    assert policy.calibration.sha256 == written.calibration.sha256


def test_a_repeated_run_prints_its_result_and_an_edited_policy_is_another_run(
    command: Any, finished: Any, fine_tune: Path, here: Path
) -> None:
    copy = here / "policy.yaml"
    Policy.load(finished.folder / "policy.yaml").save(copy)
    words = line(finished, fine_tune, here / "out")
    words[words.index("--policy") + 1] = str(copy)
    first, again = command(*words), command(*words)
    assert (first.code, again.code) == (0, 0)
    assert again.out == first.out
    text = copy.read_text()
    copy.write_text(text.replace("seed: 0", "seed: 1"))
    other = command(*words)
    assert other.code == 2
    assert "a different policy" in other.err


# Refusals


def refused(outcome: Any, folder: Path, *words: str) -> None:
    assert outcome.code == 2
    assert not (folder / "policy.yaml").exists()
    (said,) = outcome.err.strip().splitlines()
    for word in words:
        assert word in said, said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--keep", "conv_in=fp16"), ("--keep", "leave out")),
        (("--compute", "int8"), ("--compute exact",)),
        (("--budget", "50%"), ("--budget", "--policy")),
    ],
    ids=lambda value: value[0],
)
def test_an_option_that_would_change_the_formats_is_refused(
    command: Any, finished: Any, fine_tune: Path, here: Path, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(command(*line(finished, fine_tune, here / "out", *more)), here / "out", *words)


def test_layers_of_other_shapes_are_named(command: Any, finished: Any, half_pipeline: Any, here: Path) -> None:
    pipe = half_pipeline()
    config = dict(pipe.unet.config)
    wider = tuple(2 * channels for channels in config["block_out_channels"])
    pipe.unet = type(pipe.unet).from_config({**config, "block_out_channels": wider})
    pipe.save_pretrained(here / "wider")
    refused(
        command(*line(finished, here / "wider", here / "out")), here / "out", "other shapes", "time_embedding.linear_1"
    )


def test_other_layers_are_refused(command: Any, finished: Any, half_pipeline: Any, here: Path) -> None:
    pipe = half_pipeline()
    pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, "layers_per_block": 2})
    pipe.save_pretrained(here / "deeper")
    refused(command(*line(finished, here / "deeper", here / "out")), here / "out", "search a policy for this model")


def test_another_class_is_refused(base: Policy, finished: Any, half_pipeline: Any, here: Path) -> None:
    policy = base.model_copy(update={"model": replace_class(base, "FluxTransformer2DModel")})
    policy.with_calibration({}).save(here / "policy.yaml")
    with pytest.raises(bitpolicy.BitPolicyError, match="FluxTransformer2DModel"):
        bitpolicy.search(half_pipeline(), policy=here / "policy.yaml", call=CALL, quiet=True)


def replace_class(policy: Policy, name: str) -> Any:
    return policy.model.model_copy(update={"class_name": name})


def test_a_file_that_is_no_policy_is_refused(command: Any, finished: Any, fine_tune: Path, here: Path) -> None:
    (here / "policy.yaml").write_text("formats: [")
    words = line(finished, fine_tune, here / "out")
    words[words.index("--policy") + 1] = str(here / "policy.yaml")
    refused(command(*words), here / "out", "policy.yaml")


def test_an_export_of_another_model_says_how_to_transfer(
    command: Any, finished: Any, fine_tune: Path, here: Path
) -> None:
    policy = str(finished.folder / "policy.yaml")
    outcome = command("export", "--policy", policy, "--model", str(fine_tune), "--output-dir", str(here / "checkpoint"))
    assert outcome.code == 2
    assert "search-policy --policy" in outcome.err


def test_corrections_are_kept_only_where_both_have_them() -> None:
    from bitpolicy.kernels.formats.named import format_named
    from bitpolicy.workflow.transfer import corrected_as

    yes, no = (Choice(format_named("int4"), correction) for correction in (True, False))
    found = corrected_as({"a": yes, "b": no, "c": yes}, {"a": yes, "b": yes, "c": no})
    assert found == {"a": yes, "b": no, "c": replace(yes, bias_correction=False)}
