"""`search-policy` from the command line: what it prints, what it writes, and what it does not repeat."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import bitpolicy
from bitpolicy import Policy
from bitpolicy.cli.running.results import print_result
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.prompting import split
from bitpolicy.search.generation import Generations
from bitpolicy.search.study.trials import load_trials
from bitpolicy.workflow.compare import _CELL, _GAP, _LINE, PICTURES

PROMPTS = "cat dog pizza heart star moon tree ball".split()
SCHEMA = {
    "budget_bytes": int,
    "policy_bytes": int,
    "checkpoint_bytes": int,
    "reference_bytes": int,
    "layers": dict,
    "chosen": str,
    "study": str,
    "predicted_error": float,
    "error_of": str,
    "compute": str,
    "psnr_db": dict,
    "uniform": dict,
    "quality": dict,
    "seconds": dict,
    "output_dir": str,
}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What it prints


def test_json_is_one_object_of_the_documented_shape_and_nothing_else(finished: Any) -> None:
    assert finished.outcome.code == 0
    assert finished.outcome.err == ""
    result = finished.outcome.result
    assert {name: type(value) for name, value in result.items()} == SCHEMA
    assert list(result) == list(SCHEMA)
    assert list(result["layers"]) == ["int4", "int8", "fp16"]
    assert list(result["psnr_db"]) == ["mean", "min", "n", "identical"]
    assert all(isinstance(seconds, float) and seconds >= 0 for seconds in result["seconds"].values())


def test_json_matches_the_files(finished: Any, toy: Path) -> None:
    result = finished.outcome.result
    unet = load_file(finished.folder / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors")
    reference = load_file(toy / "unet" / "diffusion_pytorch_model.safetensors")
    assert result["reference_bytes"] == sum(tensor.nbytes for tensor in reference.values())
    assert result["budget_bytes"] == result["reference_bytes"] // 2
    assert result["checkpoint_bytes"] == result["policy_bytes"] == sum(tensor.nbytes for tensor in unet.values())
    assert result["policy_bytes"] <= result["budget_bytes"]
    assert result["output_dir"] == str(finished.folder)


def test_the_layers_are_those_of_the_policy(finished: Any, layer_names: list[str]) -> None:
    choices = Policy.load(finished.folder / "policy.yaml").resolve(layer_names)
    counted = Counter(choice.format.name for choice in choices.values())
    assert finished.outcome.result["layers"] == {name: counted[name] for name in ("int4", "int8", "fp16")}
    assert sum(counted.values()) == 83


def test_the_budget_is_used(finished: Any) -> None:
    result = finished.outcome.result
    assert result["policy_bytes"] > 0.95 * result["budget_bytes"]
    assert result["psnr_db"]["n"] == 16
    assert result["psnr_db"]["min"] <= result["psnr_db"]["mean"]
    assert 0 < result["predicted_error"] < 1


def test_without_json_a_table_is_printed_on_stdout(command: Any, finished: Any) -> None:
    outcome = command(*(argument for argument in finished.arguments if argument != "--json"))
    assert outcome.code == 0
    result = finished.outcome.result
    assert "trials" in result["chosen"]
    assert result["chosen"][:20] in outcome.out
    for shown in ("bitpolicy", f"{result['policy_bytes']:,}", "(equal)", "input_stem", "bitpolicy.load_pipeline"):
        assert shown in outcome.out
    assert "the study: all 2 trials ran" in outcome.out.splitlines()[-5:]
    assert "INT4 everywhere" in outcome.out


@pytest.mark.parametrize(
    ("formats", "identical", "said"),
    [("int4 int8 fp16", False, True), ("int4 int6 int8 fp16", False, False), ("int4 int8 fp16", True, False)],
)
def test_more_widths_are_suggested_if_they_can_help(
    finished: Any, formats: str, identical: bool, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {**finished.outcome.result, "layers": dict.fromkeys(formats.split(), 1)}
    if identical:
        result["psnr_db"] = {**result["psnr_db"], "mean": None, "identical": 4}
    print_result(result)
    assert ("--formats all" in capsys.readouterr().out) == said


def test_the_process_prints_only_the_json(process: Any, small: tuple[str, ...], here: Path) -> None:
    """As a shell sees it: file descriptors, not Python's streams."""
    outcome = process("--budget", "99GB", *small, "--output-dir", "out", "--json")
    assert outcome.code == 0
    assert set(outcome.result) == set(SCHEMA) - {"study", "uniform"}  # nothing is quantized
    assert len(outcome.err.splitlines()) == 1  # the notice that everything fits


# What it writes


def test_the_folder_holds_what_the_readme_promises(finished: Any) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    tables = {"sensitivity.safetensors", "sensitivity.csv"}
    assert names == {
        "policy.yaml",
        "calibration.safetensors",
        "checkpoint",
        "compare.png",
        "study.journal",
        "trials.csv",
    } | tables | {
        "run.json",
        "result.json",
        "work",
    }
    assert [path for path in finished.folder.rglob("*") if path.name.startswith(".")] == []


def test_the_picture_shows_the_reference_above_the_checkpoint(finished: Any, toy: Path) -> None:
    """Each held-out sample as diffusers draws it, first with the original model, then with the checkpoint."""
    pipes = [DiffusionPipeline.from_pretrained(toy, dtype=torch.float32)]
    pipes.append(bitpolicy.load_pipeline(finished.folder / "checkpoint", torch.float32))
    held_out = split(PROMPTS, 0, 16, 16, 16, 16).held_out
    with Image.open(finished.folder / "compare.png") as picture:
        sheet = np.asarray(picture.convert("RGB")).astype(int)
    for column in (0, 7):
        drawn = [cell_of(pipe, held_out[column]) for pipe in pipes]
        for row in (0, 1):
            shown = cell_at(sheet, column, row)
            own, other = (abs(shown - drawn[i]) for i in (row, 1 - row))
            assert own.max() <= 1, (column, row)
            assert own.sum() < other.sum() / 4, (column, row)


def test_the_third_row_shows_the_best_single_format(
    finished: Any, command: Any, small: tuple[str, ...], here: Path
) -> None:
    """A search with exactly its bytes can only choose that format, and shows the same images in its second row."""
    uniform = finished.outcome.result["uniform"]
    assert (uniform["name"], uniform["format"], uniform["larger"]) == ("INT4 everywhere", "int4", False)
    assert uniform["policy_bytes"] <= finished.outcome.result["policy_bytes"]
    assert uniform["policy_psnr_db"]["mean"] > uniform["psnr_db"]["mean"] + 3
    bytes_alone = ("--budget", str(uniform["policy_bytes"]), *small[:-1], "0", "--json")
    result = command(*bytes_alone, "--output-dir", "int4").result
    assert result["layers"] == {"int4": sum(result["layers"].values()), "int8": 0, "fp16": 0}
    assert result["policy_bytes"] == uniform["policy_bytes"]
    assert result["uniform"]["policy_psnr_db"]["mean"] == pytest.approx(uniform["psnr_db"]["mean"], abs=0.01)
    sheets = []
    for folder in (finished.folder, here / "int4"):
        with Image.open(folder / "compare.png") as picture:
            sheets.append(np.asarray(picture.convert("RGB")).astype(int))
    for column in (0, 7):
        shown, expected = cell_at(sheets[0], column, 2), cell_at(sheets[1], column, 1)
        assert abs(shown - expected).max() <= 1, column
        assert abs(cell_at(sheets[0], column, 1) - expected).max() > 1, column


def test_trials_minimise_the_objective(command: Any, small: tuple[str, ...], here: Path) -> None:
    """Scores are those of SSIM, not of squared errors, and the policy says so."""
    outcome = command("--budget", "50%", *small, "--quantizer", "rtn", "--objective", "ssim", "--output-dir", "out")
    assert outcome.code == 0, outcome.err
    about = Policy.load(Path("out/policy.yaml")).provenance["search"]
    assert about["objective"] == "ssim"
    (first, *_) = load_trials(Path("out/trials.csv"))
    assert first.psnr_db is not None
    assert first.score != pytest.approx(10 ** (-first.psnr_db / 10), rel=0.5)
    assert 0 < min(about["finalists"]) < 0.5


def test_a_format_that_overflows_has_no_row(
    command: Any, small: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search is otherwise complete."""

    def overflow(*_: Any) -> Any:
        raise BitPolicyError("the decoded image has NaN or Inf")

    monkeypatch.setattr(Generations, "images", overflow)
    outcome = command("--budget", "50%", *small[:-1], "0", "--quantizer", "rtn", "--json", "--output-dir", "out")
    assert outcome.code == 0
    assert "uniform" not in outcome.result
    (line,) = outcome.err.splitlines()
    assert line == "warning: compare.png has no row for INT4 everywhere: the decoded image has NaN or Inf"
    with Image.open("out/compare.png") as picture:
        assert picture.height == 2 * _LINE + 2 * (_CELL + _GAP) + _LINE


def cell_of(pipe: Any, sample: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(sample.seed)
    (image,) = pipe(sample.prompt, num_inference_steps=2, guidance_scale=1.0, generator=seeded).images
    return np.asarray(image.resize((_CELL, _CELL), Image.Resampling.BICUBIC)).astype(int)


def cell_at(sheet: np.ndarray, column: int, row: int) -> np.ndarray:
    y = 2 * _LINE + row * (_CELL + _GAP) + max(row - 1, 0) * _LINE
    x = sheet.shape[1] - (PICTURES - column) * (_CELL + _GAP)
    return sheet[y : y + _CELL, x : x + _CELL]


def test_the_policy_records_its_origin(finished: Any, toy: Path) -> None:
    policy = yaml.safe_load((finished.folder / "policy.yaml").read_text())
    result = finished.outcome.result
    assert policy["bitpolicy"] == 1
    assert policy["model"]["id"] == str(toy)
    assert (policy["model"]["component"], policy["model"]["class"]) == ("unet", "UNet2DConditionModel")
    assert policy["budget"] == {"asked": "50%", "bytes": result["budget_bytes"], "scope": "weights"}
    assert policy["result"]["policy_bytes"] == result["policy_bytes"]
    assert policy["result"]["psnr_db"] == pytest.approx(result["psnr_db"]["mean"], abs=0.01)
    assert policy["provenance"]["search"]["trials"] == 2
    assert policy["provenance"]["call"] == {"num_inference_steps": 2, "guidance_scale": 1.0}
    assert policy["provenance"]["calibration"].startswith("sha256:")


def test_the_checkpoint_carries_its_policy(finished: Any) -> None:
    checkpoint = finished.folder / "checkpoint"
    assert (checkpoint / "policy.yaml").read_bytes() == (finished.folder / "policy.yaml").read_bytes()
    assert yaml.safe_load((checkpoint / "policy.yaml").read_text())["defaults"]["quantizer"] == "gptq"
    assert not (checkpoint / "calibration.safetensors").exists(), "the weights already contain the rounded values"
    card = (finished.folder / "checkpoint" / "README.md").read_text()
    assert f"{finished.outcome.result['policy_bytes']:,}" in card


def test_the_checkpoint_loads_and_draws(finished: Any) -> None:
    pipe = bitpolicy.load_pipeline(finished.folder / "checkpoint", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(0)
    (image,) = pipe("cat", num_inference_steps=2, output_type="pt", generator=seeded).images
    assert torch.isfinite(image).all()
    assert image.std() > 0.01


# What it does not do


def test_the_same_command_again_prints_the_same_without_any_work(
    command: Any, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitpolicy.cli.running.search.make_plan", lambda *_: pytest.fail("the model was loaded"))
    before = tree(finished.folder)
    again = command(*finished.arguments)
    assert (again.code, again.result) == (0, finished.outcome.result)
    assert "finished" in again.err
    assert tree(finished.folder) == before
    assert command(*finished.arguments, "--quiet").err == ""


def test_a_dry_run_prints_the_plan_and_writes_nothing(command: Any, small: tuple[str, ...], here: Path) -> None:
    outcome = command("--budget", "50%", *small, "--dry-run")
    assert outcome.code == 0
    for shown in ("83 layers", "smallest", "16 calibration", "nothing was written"):
        assert shown in outcome.out
    assert list(here.iterdir()) == []


def test_the_default_output_folder_is_in_the_current_one(command: Any, small: tuple[str, ...], here: Path) -> None:
    assert command("--budget", "99GB", *small, "--json").result["output_dir"] == "bitpolicy-out"
    assert [path.name for path in here.iterdir()] == ["bitpolicy-out"]


def test_search_policy_is_bitpolicy_search(command: Any, finished: Any) -> None:
    assert command("search", *finished.arguments).result == finished.outcome.result


# Special budgets and prompts


def test_a_budget_above_fp16_keeps_every_layer(command: Any, small: tuple[str, ...], here: Path) -> None:
    outcome = command("--budget", "99GB", *small, "--output-dir", "out", "--json")
    assert outcome.code == 0
    result = outcome.result
    assert result["layers"] == {"int4": 0, "int8": 0, "fp16": 83}
    assert result["policy_bytes"] == result["checkpoint_bytes"] == result["reference_bytes"] < result["budget_bytes"]
    assert result["psnr_db"] == {"mean": None, "min": None, "n": 16, "identical": 16}
    assert result["predicted_error"] == 0.0
    assert "every layer stays FP16" in outcome.err
    text = command("--budget", "99GB", *small, "--output-dir", "out")
    assert text.code == 0
    assert "all identical" in text.out


def test_a_budget_of_exactly_fp16_keeps_every_layer(
    command: Any, small: tuple[str, ...], here: Path, finished: Any
) -> None:
    budget = f"{finished.outcome.result['reference_bytes']}B"
    result = command("--budget", budget, *small, "--output-dir", "out", "--json").result
    assert result["layers"]["fp16"] == 83


def test_a_budget_of_exactly_the_smallest_policy_is_met(command: Any, small: tuple[str, ...], here: Path) -> None:
    refused = command("--budget", "1kB", *small)
    smallest = int(refused.err.split("fp16: ")[1].split(" bytes")[0].replace(",", ""))
    without_images = ("--probe", "weight", "--trials", "0")
    result = command("--budget", f"{smallest}B", *small, *without_images, "--json").result
    assert result["checkpoint_bytes"] == result["policy_bytes"] == result["budget_bytes"] == smallest
    assert result["layers"] == {"int4": 83, "int8": 0, "fp16": 0}
    assert result["predicted_error"] is None


@pytest.mark.parametrize(("count", "reported"), [(7, True), (8, False)])
def test_fewer_than_eight_prompts_are_reported(
    command: Any, small: tuple[str, ...], here: Path, count: int, reported: bool
) -> None:
    (here / "few.txt").write_text("\n".join(f"word{i}" for i in range(count)))
    outcome = command("--budget", "99GB", *small, "--prompts", "few.txt", "--json")
    assert outcome.code == 0
    assert ("fewer than 8 prompts" in outcome.err) is reported


# Folders that hold something


def test_overwrite_replaces_a_search_and_keeps_other_files(
    command: Any, small: tuple[str, ...], finished: Any, here: Path
) -> None:
    shutil.copytree(finished.folder, here / "out")
    (here / "out" / "mine.txt").write_text("mine")
    (here / "out" / "more").mkdir()
    (here / "out" / "more" / "mine.bin").write_bytes(b"mine")
    outcome = command("--budget", "99GB", *small, "--output-dir", "out", "--overwrite", "--json")
    assert outcome.code == 0
    assert outcome.result["layers"]["fp16"] == 83
    assert json.loads((here / "out" / "run.json").read_text())["budget"] == "99GB"
    assert (here / "out" / "mine.txt").read_text() == "mine"
    assert (here / "out" / "more" / "mine.bin").read_bytes() == b"mine"
    left = {path.name for path in (here / "out").iterdir()}
    assert left.isdisjoint({"study.journal", "sensitivity.csv", "sensitivity.safetensors"})  # of the search before
    assert not (here / "out" / "checkpoint" / "calibration.safetensors").exists()


def test_overwrite_accepts_a_folder_with_something_else(command: Any, small: tuple[str, ...], here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("mine")
    assert command("--budget", "99GB", *small, "--output-dir", "out", "--overwrite", "--json").code == 0
    assert (here / "out" / "mine.txt").read_text() == "mine"
    assert (here / "out" / "checkpoint" / "model_index.json").is_file()


def test_no_resume_runs_the_search_again(command: Any, small: tuple[str, ...], here: Path) -> None:
    arguments = ("--budget", "99GB", *small, "--output-dir", "out", "--json")
    command(*arguments)
    (here / "out" / "checkpoint" / "README.md").unlink()
    again = command(*arguments, "--no-resume")
    assert again.code == 0
    assert "finished" not in again.err
    assert (here / "out" / "checkpoint" / "README.md").is_file()


def test_an_empty_folder_is_accepted(command: Any, small: tuple[str, ...], here: Path) -> None:
    (here / "out").mkdir()
    assert command("--budget", "99GB", *small, "--output-dir", "out", "--json").code == 0


# Same settings, same policy


def test_equal_commands_in_two_folders_write_equal_files(
    command: Any, small: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--budget", "40%", *small, "--probe", "weight", "--trials", "1", "--json")
    for folder in ("a", "b"):
        assert command(*arguments, "--output-dir", folder).code == 0
    a, b = tree(here / "a"), tree(here / "b")
    for different in ("result.json", "study.journal"):  # seconds, and times of day
        assert a.pop(different) != b.pop(different)
    assert [name for name in a if a[name] != b.get(name)] == []
    assert set(a) == set(b)


# A model whose corrected biases leave the storage dtype's range


@pytest.fixture
def wild(half_pipeline: Any, here: Path) -> Path:
    """A toy whose middle convolution gets the input 6e4 everywhere; the next norm removes that again."""
    pipe = half_pipeline()
    resnet = pipe.unet.mid_block.resnets[0]
    resnet.norm1.weight.data.zero_()
    resnet.norm1.bias.data.fill_(6e4)
    resnet.conv1.weight.data.mul_(256.0)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        torch.nn.Module.to(model, torch.float16)
    pipe.save_pretrained("wild")
    return here / "wild"


def test_a_bias_that_float16_could_not_hold_is_not_corrected_from_the_probe_to_the_checkpoint(
    command: Any, small: tuple[str, ...], wild: Path, here: Path
) -> None:
    name = "mid_block.resnets.0.conv1"
    rest = (*small[2:], "--model", wild, "--output-dir", here / "out", "--keep", f"{name}=int4")
    outcome = command("--budget", "40%", *rest, "--json")
    assert outcome.code == 0, outcome.err
    (warning,) = outcome.err.splitlines()
    assert warning.startswith(f"warning: 1 layer keeps its bias, {name}: ")
    assert "range of float16" in warning
    assert outcome.result["psnr_db"]["min"] > 10
    policy = Policy.load(here / "out" / "policy.yaml")
    choices = policy.resolve([name], component="unet")
    assert (choices[name].format.name, choices[name].bias_correction) == ("int4", False)
    written = load_file(here / "out" / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors")
    before = load_file(wild / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(written[f"{name}.bias"], before[f"{name}.bias"])
    assert [key for key, t in written.items() if t.is_floating_point() and not torch.isfinite(t).all()] == []
    hand = yaml.safe_load((here / "out" / "policy.yaml").read_text())  # a person turns the correction on
    hand["layers"][name] = {"format": "int4", "bias_correction": True}
    (here / "out" / "hand.yaml").write_text(yaml.safe_dump(hand))
    again = command("export", "--model", wild, "--policy", here / "out" / "hand.yaml", "--output-dir", here / "hand")
    assert (again.code, again.err) == (0, outcome.err)
    assert load_file(here / "hand" / "unet" / "diffusion_pytorch_model.safetensors").keys() == written.keys()
