"""Arguments from Python callers: what is accepted, and that each mistake is one error that names the argument."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitpolicy
from bitpolicy import BitPolicyError, Policy
from bitpolicy.arguments import in_python
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.settings import Settings

CALL = {"num_inference_steps": 2, "guidance_scale": 1.0}
SMALL = {"calibration_samples": 2, "vectors": 1, "search_samples": 2, "confirm_samples": 2, "held_out_samples": 2}
QUICK = {"call": CALL, "trials": 0, "probe": "weight", "quantizer": "rtn", "quiet": True, **SMALL}
ROOT = Path(bitpolicy.__file__).parents[1]
NewPipeline = Callable[[], Any]


@pytest.fixture(scope="module")
def pipe(half_pipeline: NewPipeline) -> Any:
    return half_pipeline()


@pytest.fixture(scope="module")
def policy(pipe: Any) -> Policy:
    return bitpolicy.search(pipe, "50%", **{**QUICK, "quantizer": "gptq"})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts of all drawn samples."""
    found: list[Any] = []
    latents = Trajectories.latents

    def noted(this: Trajectories, samples: Any) -> Any:
        samples = list(samples)
        found.extend(sample.prompt for sample in samples)
        return latents(this, samples)

    monkeypatch.setattr(Trajectories, "latents", noted)
    return found


# What is taken


@pytest.mark.parametrize("budget", [200_000, "200000", np.int64(200_000), 2e5, "200kB"])
def test_a_budget_is_bytes_as_a_number_or_as_text(pipe: Any, budget: Any) -> None:
    record = bitpolicy.search(pipe, budget, **QUICK).budget
    assert record is not None
    assert record.bytes == 200_000
    assert record.asked in ("200000", "200kB")


def test_a_bare_number_is_bytes_on_the_command_line_too(command: Any, toy: Path, here: Path) -> None:
    line = ("--model", toy, "--budget", "200000", "--probe", "weight", "--quantizer", "rtn", "--trials", "0")
    outcome = command(*line, "--num-inference-steps", "2", "--json", "--output-dir", "out")
    assert outcome.result["budget_bytes"] == 200_000


def test_a_folder_is_accepted_as_a_pipeline(pipe: Any, toy: Path, tmp_path: Path) -> None:
    """By every function, with the same scores, choices and bytes as for the pipeline in memory."""
    ours, theirs = (bitpolicy.search(given, "50%", **QUICK) for given in (pipe, toy))
    assert theirs.model.id == str(toy)
    assert theirs.layers == ours.layers
    assert theirs.model.sha256 == ours.model.sha256
    few = {"call": CALL, "samples": 1, "vectors": 1, "quiet": True, "quantizer": "rtn"}
    scores = [bitpolicy.probe(given, **few).error for given in (pipe, str(toy))]
    assert torch.equal(*scores)
    assert bitpolicy.export(toy, theirs, tmp_path / "one") == bitpolicy.export(pipe, ours, tmp_path / "two")
    written = bitpolicy.export_for(
        str(toy), bitpolicy.search(toy, "60%", target="sdnq", **QUICK), tmp_path / "x", "sdnq"
    )
    assert written.nbytes > 0


def test_loading_options_apply_to_a_pipeline_given_by_path(toy: Path) -> None:
    with pytest.raises(BitPolicyError, match=r"variant=fp16|variant 'fp16'"):
        bitpolicy.search(toy, "50%", variant="fp16", **QUICK)
    bitpolicy.search(toy, "50%", dtype="float32", device="cpu", **QUICK)


@pytest.mark.parametrize(
    "keep",
    [{"conv_in": "int8", "*time_embedding*": "fp16"}, ["conv_in=int8", "*time_embedding*=fp16"], "conv_in=int8"],
    ids=["mapping", "sequence", "one"],
)
def test_layers_are_kept_by_a_mapping_a_sequence_or_one_rule(pipe: Any, layer_names: list[str], keep: Any) -> None:
    found = bitpolicy.search(pipe, "60%", keep=keep, **QUICK).resolve(layer_names)
    assert found["conv_in"].format.name == "int8"
    if not isinstance(keep, str):
        assert {c.format.name for name, c in found.items() if "time_embedding" in name} == {"fp16"}


def test_one_string_is_one_prompt_and_a_path_is_a_file(pipe: Any, drawn: list[Any], prompts: Path) -> None:
    bitpolicy.probe(pipe, prompts="a red heart", probe="weight", call=CALL, samples=2, quiet=True)
    assert set(drawn) == {"a red heart"}
    drawn.clear()
    bitpolicy.probe(pipe, prompts=prompts, probe="weight", call=CALL, samples=4, quiet=True)
    assert set(drawn) <= set(prompts.read_text().split())
    drawn.clear()
    bitpolicy.probe(pipe, prompts={"prompt": "a cat"}, probe="weight", call=CALL, samples=1, quiet=True)
    assert set(drawn) == {"a cat"}
    drawn.clear()
    bitpolicy.probe(pipe, prompts=[3, "seven"], probe="weight", call=CALL, samples=2, quiet=True)
    assert set(drawn) == {"3", "seven"}


def test_a_dtype_can_be_given_by_name(policy: Policy, pipe: Any, tmp_path: Path) -> None:
    bitpolicy.export(pipe, policy, tmp_path / "out", component_dtype="float32", max_shard_size="1MB")
    assert bitpolicy.load_pipeline(tmp_path / "out", "float32", "cpu").unet.dtype == torch.float32
    with pytest.raises(BitPolicyError, match=r"^dtype is 'fp32'; give float16, bfloat16, float32"):
        bitpolicy.load_pipeline(tmp_path / "out", "fp32")
    with pytest.raises(BitPolicyError, match=r"^device is 'tpuu'; give"):
        bitpolicy.load_pipeline(tmp_path / "out", device="tpuu")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trials": -1}, "trials is -1; give at least 0"),
        ({"trials": 2.5}, r"trials is 2.5 \(float\); give a whole number"),
        ({"trials": "many"}, r"trials is 'many' \(str\); give a whole number"),
        ({"trials": True}, r"trials is True \(bool\); give a whole number"),
        ({"samples": 0}, "samples is 0; give at least 1"),
        ({"remeasure": -1}, "remeasure is -1; give at least 0"),
        ({"timeout": float("nan")}, "timeout is nan; give at least 0"),
        ({"budget": [5]}, r"budget is \[5\] \(list\); give a whole number or a number or a string or None"),
        ({"budget": 4.5}, 'budget=4.5 is no number of bytes; write 5000000, "3GB"'),
        ({"budget": ""}, "budget '' is not a size; write 3GB"),
        ({"budget": None}, "asked for nothing; give one of budget=SIZE, target_psnr=DB"),
        ({"target_psnr": 30}, "asked for budget and target_psnr;"),
        ({"prompts": 5}, r"prompts is 5 \(int\); give a string or a path or a mapping or a sequence or None"),
        ({"prompts": []}, "prompts has no prompt in it"),
        ({"prompts": Path("nothing.txt")}, "cannot read prompts nothing.txt"),
        ({"call": [1]}, r"call is \[1\] \(list\); give a mapping or None"),
        ({"formats": 4}, r"formats is 4 \(int\); give a string or a sequence"),
        ({"formats": ""}, 'no format given; write for example formats="int4,int8,fp16"'),
        ({"keep": {"conv_inn": "fp16"}}, "keep 'conv_inn=fp16' matches none of the 83 layers"),
        ({"keep": 5}, r"keep is 5 \(int\); give a mapping or a sequence or a string"),
        ({"scope": "peak", "compute": "int8"}, 'scope="peak" counts .* take scope="weights", or compute="exact"'),
        ({"height": 64}, 'height, width and batch_size .*; add scope="peak"'),
        ({"trails": 3}, "search has no argument 'trails'; did you mean 'trials'"),
        ({"model": "x"}, "search has no argument 'model'"),
        ({"dtype": "float32"}, "dtype is for loading a pipeline, .* in memory"),
        ({"compute": "fp8"}, 'compute="fp8" rounds the inputs .* add fp8 to formats, or take compute="exact"'),
        ({"output_dir": ""}, "output_dir is empty; give a string or a path or None"),
        ({"frontier": 3, "budget": None}, "frontier alone .* budget or target_psnr"),
    ],
    ids=str,
)
def test_a_mistake_is_one_error_that_names_the_argument(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BitPolicyError, match=f"^{message}") as caught:
        bitpolicy.search(pipe, **{"budget": "50%", **QUICK, **arguments})
    assert "--" not in str(caught.value)


@pytest.mark.parametrize("given", [None, 5, "", torch.nn.Linear(2, 2)], ids=str)
def test_anything_but_a_pipeline_is_refused(given: Any, policy: Policy, tmp_path: Path) -> None:
    message = "^pipe is .*; give a diffusers pipeline or a string or a path$"
    for call in (
        lambda: bitpolicy.search(given, "50%"),
        lambda: bitpolicy.probe(given),
        lambda: bitpolicy.export(given, policy, tmp_path / "out"),
        lambda: bitpolicy.export_for(given, policy, tmp_path / "out", "sdnq"),
    ):
        with pytest.raises(BitPolicyError, match=message):
            call()
    with pytest.raises(BitPolicyError, match=r"^pipe \./nothing: there is no such folder or file"):
        bitpolicy.search("./nothing", "50%")
    assert list(tmp_path.iterdir()) == []


def test_every_function_suggests_the_nearest_argument(pipe: Any, policy: Policy, tmp_path: Path) -> None:
    for function, given, wrong, near in (
        (bitpolicy.probe, (pipe,), "sample", "samples"),
        (bitpolicy.export, (pipe, policy, tmp_path / "out"), "overwite", "overwrite"),
        (bitpolicy.export_for, (pipe, policy, tmp_path / "out", "sdnq"), "requantise", "requantize"),
        (bitpolicy.load_pipeline, (tmp_path,), "devise", "device"),
    ):
        with pytest.raises(BitPolicyError, match=f"has no argument '{wrong}'; did you mean '{near}'"):
            function(*given, **{wrong: 1})  # type: ignore[operator]


def test_a_policy_of_another_type_is_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(BitPolicyError, match=r"^policy is \{\} \(dict\); give a policy or a string or a path"):
        bitpolicy.export(pipe, {}, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(BitPolicyError, match=r"^policy is empty; give"):
        bitpolicy.export(pipe, "", tmp_path / "out")


@pytest.mark.parametrize("size", ["many", "0", "45%", -5])
def test_a_meaningless_shard_size_is_refused_by_name(pipe: Any, policy: Policy, tmp_path: Path, size: Any) -> None:
    with pytest.raises(BitPolicyError, match=r"^max_shard_size .*; write a size such as 10GB"):
        bitpolicy.export(pipe, policy, tmp_path / "out", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


# Saving, and folders that already exist


def test_a_policy_keeps_its_calibration_wherever_it_is_saved(pipe: Any, policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "here" / "policy.yaml")
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"policy.yaml", "calibration.safetensors"}
    loaded = Policy.load(tmp_path / "here" / "policy.yaml")
    assert loaded == policy
    assert loaded.calibration is not None
    assert policy.calibration is not None
    read, held = loaded.calibration.tensors(), policy.calibration.tensors()
    assert set(read) == set(held)
    assert all(torch.equal(read[name], tensor) for name, tensor in held.items())
    loaded.save(tmp_path / "there" / "mine.yaml")
    (tmp_path / "here" / "calibration.safetensors").unlink()
    moved = Policy.load(tmp_path / "there" / "mine.yaml")
    assert bitpolicy.export(pipe, moved, tmp_path / "out") == bitpolicy.export(pipe, policy, tmp_path / "again")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def test_a_policy_without_its_calibration_can_be_read_and_saved(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "policy.yaml")
    (tmp_path / "calibration.safetensors").unlink()
    loaded = Policy.load(tmp_path / "policy.yaml")
    assert loaded.calibration is None
    loaded.save(tmp_path / "copy" / "policy.yaml")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["policy.yaml"]


def test_saving_where_it_was_loaded_from_leaves_the_calibration(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "policy.yaml")
    before = (tmp_path / "calibration.safetensors").stat()
    Policy.load(tmp_path / "policy.yaml").save(tmp_path / "policy.yaml")
    after = (tmp_path / "calibration.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_an_export_replaces_nothing_without_overwrite(pipe: Any, policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is free
    bitpolicy.export(pipe, policy, tmp_path / "out")
    before = (tmp_path / "out" / "model_index.json").stat().st_ino
    with pytest.raises(BitPolicyError, match="out already exists; choose another output_dir, or give overwrite=True"):
        bitpolicy.export(pipe, policy, tmp_path / "out")
    with pytest.raises(BitPolicyError, match="out already exists"):
        bitpolicy.export_for(pipe, policy, tmp_path / "out", "sdnq")
    assert (tmp_path / "out" / "model_index.json").stat().st_ino == before
    bitpolicy.export(pipe, policy, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model_index.json").stat().st_ino != before


# How messages are spelled


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("--target-psnr is nan; give dB", "target_psnr is nan; give dB"),
        ("raise --budget or add one to --formats", "raise budget or add one to formats"),
        ("take --probe adjoint or --probe ablation.", 'take probe="adjoint" or probe="ablation".'),
        (
            "more --samples make it steadier; give --samples 2 or more",
            "more samples make it steadier; give samples=2 or more",
        ),
        ("--keep '*a*=fp16' matches none", "keep '*a*=fp16' matches none"),
        ("leave --offload out, or --share-qkv", "leave offload=True out, or share_qkv=True"),
        ("--model ./x: there is none", "pipe ./x: there is none"),
        ("try --dtype bfloat16 or float32", 'try dtype="bfloat16" or float32'),
        ("--target comfy --formats int4,int8-sym", 'target="comfy" formats="int4,int8-sym"'),
        ("`bitpolicy probe --check` creates it; --vectors 4", "`bitpolicy probe --check` creates it; vectors=4"),
        ("a--budget is no option, nor is --", "a--budget is no option, nor is --"),
    ],
)
def test_options_become_arguments_and_commands_stay(text: str, python: str) -> None:
    assert in_python(text, ["budget", "samples", "target_psnr"]) == python


def test_every_option_that_a_message_names_is_an_argument_in_python() -> None:
    """In the code that the Python interface runs. Options that only commands have are in bitpolicy/cli, report and
    check."""
    functions = (bitpolicy.search, bitpolicy.probe, bitpolicy.export, bitpolicy.export_for, bitpolicy.load_pipeline)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    names |= set(Settings.__dataclass_fields__)
    only_commands = {"metrics", "images", "real_images", "check", "split", "num_inference_steps", "guidance_scale"}
    places = ("kernels", "policies", "sensitivity", "search", "bitpolicy")
    files = [path for place in places for path in (ROOT / place).rglob("*.py")]
    skipped = (ROOT / "bitpolicy" / "cli", ROOT / "bitpolicy" / "report")
    found = set()
    for path in (path for path in files if not any(folder in path.parents for folder in skipped)):
        for raised in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)):
            texts = [n.value for n in ast.walk(raised) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            outside = " ".join(" ".join(texts).split("`")[::2])
            found |= {option.replace("-", "_") for option in re.findall(r"(?<![\w-])--([a-z][a-z-]*[a-z])", outside)}
    assert len(found) > 15
    assert found - names - only_commands - {"model"} == set()
