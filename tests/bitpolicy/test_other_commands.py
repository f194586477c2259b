"""`bitpolicy probe`, `export`, `eval` and `inspect` on the results of a search."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from toy_convolutions import ToyConvolutions

from bitpolicy.kernels.dispatch import TABLE
from bitpolicy.kernels.errors import BitPolicyWarning
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.identity import weights_hash
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.policy_records import BudgetRecord, ModelReference
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.table_files import read_table
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.workflow.over_budget import warn_if_over_budget

UNET = "unet/diffusion_pytorch_model.safetensors"
CALL = ("--num-inference-steps", "2", "--guidance-scale", "1")


@pytest.fixture(scope="module")
def other_toy(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline except for one weight."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(toy, folder)
    weights = load_file(folder / UNET)
    weights["conv_out.weight"][0, 0, 0, 0] += 1
    save_file(weights, folder / UNET, metadata={"format": "pt"})
    return folder


# probe


@pytest.fixture
def probe(command: Any, toy: Path, prompts: Path) -> Any:
    """`probe(*arguments)`: two samples with one vector each."""
    sizes = ("--samples", "2", "--vectors", "1")
    return lambda *more: command("probe", "--model", toy, "--prompts", prompts, *CALL, *sizes, *more)


def test_probe_writes_the_table_and_prints_the_worst_layers(probe: Any, here: Path) -> None:
    outcome = probe("--output-dir", "out")
    assert (outcome.code, outcome.err) == (0, "")
    table = read_table(here / "out" / "sensitivity.safetensors")
    rows = list(csv.DictReader((here / "out" / "sensitivity.csv").open()))
    assert len(rows) == 83 * 2
    worst = table.layers[int(table.error.amax(1).argmax())]
    assert worst[:30] in outcome.out
    assert table.sketches is not None
    assert table.sketches.shape == (2, 83, 2)


def test_probe_prints_json_and_nothing_else(probe: Any, here: Path) -> None:
    result = probe("--output-dir", "out", "--json").result
    assert set(result) == {"layers", "probe", "forwards", "times_below_ablation", "seconds", "output_dir"}
    assert (result["layers"], result["probe"], result["output_dir"]) == (83, "adjoint", "out")


def test_probe_resumes_where_it_stopped(probe: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe("--output-dir", "out")
    first = (here / "out" / "sensitivity.csv").read_bytes()
    monkeypatch.setattr(Trajectories, "differentiable_signal", lambda *_: pytest.fail("a sample was probed again"))
    assert probe("--output-dir", "out").code == 0
    assert (here / "out" / "sensitivity.csv").read_bytes() == first


def test_probe_takes_the_requested_formats(probe: Any, here: Path) -> None:
    assert probe("--formats", "int4-g32", "--probe", "weight", "--output-dir", "out").code == 0
    table = read_table(here / "out" / "sensitivity.safetensors")
    assert [format.name for format in table.formats] == ["int4-g32"]
    assert table.probe == "weight"


def test_probe_refuses_a_file_as_its_folder(probe: Any, here: Path) -> None:
    (here / "out").write_text("x")
    probe("--output-dir", "out").assert_refused("bitpolicy", "out")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_probe_never_replaces_the_results_of_a_search(probe: Any, finished: Any, here: Path) -> None:
    shutil.copytree(finished.folder, here / "out")
    before = tree(here / "out")
    outcome = probe("--check", "--output-dir", "out")
    outcome.assert_refused("bitpolicy", "out holds a search", "sensitivity table", "e.g. --output-dir out-probe")
    assert tree(here / "out") == before
    (here / "out" / "run.json").unlink()  # as a search from Python leaves it
    probe("--check", "--output-dir", "out").assert_refused("bitpolicy", "out holds a search")
    assert probe("--probe", "weight", "--output-dir", "out-probe").code == 0


def test_a_search_replaces_the_results_of_a_probe_only_with_overwrite(
    probe: Any, command: Any, small: tuple[str, ...], here: Path
) -> None:
    assert probe("--split", "--output-dir", "out").code == 0
    (here / "out" / "check.json").write_text("{}")
    before = tree(here / "out")
    search = ("--budget", "50%", *small, "--trials", "0", "--output-dir", "out")
    command(*search).assert_refused("search-policy", "out holds", "--overwrite")
    assert tree(here / "out") == before
    assert command(*search, "--overwrite").code == 0
    names = {path.name for path in (here / "out").iterdir()}
    assert names.isdisjoint({"split.safetensors", "check.json"}), "they belong to another table than the search's"
    assert names > {"policy.yaml", "checkpoint"}


@pytest.mark.parametrize("arguments", [("--samples", "0"), ("--vectors", "0"), ("--probe", "magic")])
def test_probe_refuses_meaningless_options(probe: Any, here: Path, arguments: tuple[str, ...]) -> None:
    probe(*arguments).assert_refused("bitpolicy", arguments[0].strip("-"))
    assert list(here.iterdir()) == []


# export


def test_export_writes_the_checkpoint_that_the_search_wrote(command: Any, finished: Any, toy: Path, here: Path) -> None:
    outcome = command("export", "--policy", finished.folder / "policy.yaml", "--model", toy, "--output-dir", "out")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"{finished.outcome.result['policy_bytes']:,} bytes" in outcome.out
    made, searched = here / "out", finished.folder / "checkpoint"
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    assert files == {str(path.relative_to(searched)) for path in searched.rglob("*") if path.is_file()}
    files.discard("tokenizer/tokenizer.json")  # remembers the padding of the last call
    assert [name for name in files if (made / name).read_bytes() != (searched / name).read_bytes()] == []


def test_another_process_with_other_threads_and_hashes_writes_the_same_bytes(
    finished: Any, toy: Path, here: Path
) -> None:
    line = ["export", "--policy", str(finished.folder / "policy.yaml"), "--model", str(toy), "--output-dir", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "bitpolicy", *line],
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    searched = finished.folder / "checkpoint"
    files = {path.relative_to(searched) for path in searched.rglob("*") if path.is_file()}
    files.discard(Path("tokenizer/tokenizer.json"))  # remembers the padding of the last call
    assert [
        name for name in sorted(files) if (here / "out" / name).read_bytes() != (searched / name).read_bytes()
    ] == []


def test_export_says_which_layers_cannot_be_packed(command: Any, here: Path) -> None:
    """It also counts them, and a search does the same."""
    torch.manual_seed(0)
    unet = ToyConvolutions()
    to_storage(unet, torch.float16)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained("model")
    about = ModelReference(
        id="toy", component="unet", class_name="ToyConvolutions", sha256=weights_hash(unet, torch.float16)
    )
    choices = {name: Choice(format_named("int8")) for name, _ in quantizable_layers(unet)}
    Policy.of(choices, model=about).save("policy.yaml")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(diffusers, "ToyConvolutions", ToyConvolutions, raising=False)
        outcome = command("export", "--policy", "policy.yaml", "--model", "./model", "--output-dir", "out")
    assert outcome.code == 0, outcome.err
    (line,) = outcome.err.splitlines()
    assert re.match(r"warning: not quantized, .*: 1 ConvTranspose1d \(", line)
    stored = load_file(here / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    left = [name for name, layer in unet.named_modules() if isinstance(layer, nn.modules.conv._ConvTransposeNd)]
    assert {stored[f"{name}.weight"].dtype for name in left} == {torch.float16}
    assert f"layers.{len(choices)}" in line
    assert sum(name.endswith("weight_packed") for name in stored) == len(choices)


def edited(finished: Any, folder: Path, **layers: Any) -> Path:
    """The search's policy with entries changed by hand, and its calibration in the same folder."""
    folder.mkdir()
    shutil.copy(finished.folder / "calibration.safetensors", folder)
    policy = yaml.safe_load((finished.folder / "policy.yaml").read_text())
    policy["layers"] |= {name.replace("__", "."): entry for name, entry in layers.items()}
    (folder / "policy.yaml").write_text(yaml.safe_dump(policy, sort_keys=False))
    return folder / "policy.yaml"


def test_export_follows_a_policy_that_was_edited(command: Any, finished: Any, toy: Path, here: Path) -> None:
    policy = edited(finished, here / "mine", conv_in={"format": "int4", "bias_correction": False, "quantizer": "rtn"})
    assert command("export", "--policy", policy, "--model", toy, "--output-dir", "out").code == 0
    assert load_file(here / "out" / UNET)["conv_in.weight_packed"].dtype == torch.uint8
    assert "conv_in.weight" not in load_file(here / "out" / UNET)


@pytest.mark.parametrize("more", [(), ("--target", "sdnq", "--requantize")])
def test_an_edited_policy_over_its_budget_is_exported_with_a_warning_that_has_both_sizes(
    command: Any, finished: Any, toy: Path, here: Path, more: tuple[str, ...]
) -> None:
    widest = {name: {"format": "fp16"} for name in ("mid_block__resnets__0__conv1", "mid_block__resnets__0__conv2")}
    policy = edited(finished, here / "mine", **widest)
    outcome = command("export", "--policy", policy, "--model", toy, "--output-dir", "out", *more)
    budget = Policy.load(policy).budget
    assert budget is not None
    size = re.search(r"([\d,]+) bytes in unet", outcome.out)
    assert outcome.code == 0
    (line,) = outcome.err.splitlines()
    assert line.startswith("warning: the policy takes ")
    assert f"budget: 50%, which is {budget.bytes:,} bytes; it is exported anyway" in line
    if size is not None:
        assert f"takes {size[1]} bytes" in line
        assert int(size[1].replace(",", "")) > budget.bytes
    assert (here / "out" / UNET).is_file()


@pytest.mark.parametrize(
    ("record", "over"),
    [
        ({"asked": "1MB", "bytes": 1_000_000}, False),
        ({"asked": "100kB", "bytes": 100_000}, True),
        ({"asked": "45 dB", "bytes": 100_000}, False),  # no size was asked for
        ({"asked": "400kB", "bytes": 400_000, "scope": "pipeline", "other_bytes": 100_000}, False),
        ({"asked": "400kB", "bytes": 400_000, "scope": "pipeline", "other_bytes": 300_000}, True),
        (None, False),
    ],
)
def test_a_policy_is_over_its_budget_by_what_the_scope_counts(
    finished: Any, half_pipeline: Any, record: dict[str, Any] | None, over: bool
) -> None:
    budget = None if record is None else BudgetRecord(**record)
    policy = Policy.load(finished.folder / "policy.yaml").model_copy(update={"budget": budget})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_if_over_budget(policy, Target.of(half_pipeline(), ["unet"]))
    assert [w.category for w in said] == [BitPolicyWarning] * over


def test_export_refuses_a_policy_with_an_unknown_layer(command: Any, finished: Any, toy: Path, here: Path) -> None:
    policy = edited(finished, here / "mine", conv_inn={"format": "int4"})
    outcome = command("export", "--policy", policy, "--model", toy, "--output-dir", "out")
    outcome.assert_refused("bitpolicy", "'conv_inn'", "did you mean 'conv_in'?")
    assert not (here / "out").exists()


def test_export_refuses_another_model(command: Any, finished: Any, other_toy: Path, here: Path) -> None:
    outcome = command(
        "export", "--policy", finished.folder / "policy.yaml", "--model", other_toy, "--output-dir", "out"
    )
    outcome.assert_refused("bitpolicy", "the policy was made for", "UNet2DConditionModel", "search-policy --policy")
    assert list(here.iterdir()) == []


def test_export_refuses_a_policy_whose_model_was_edited(
    command: Any, finished: Any, toy: Path, other_toy: Path, here: Path
) -> None:
    """gptq rounded the first model, so its codes are the first model's weights."""
    policy = edited(finished, here / "mine")
    hashes = {name: weights_hash(load_unet(folder), torch.float16) for name, folder in (("a", toy), ("b", other_toy))}
    text = policy.read_text()
    assert hashes["a"] in text
    policy.write_text(text.replace(hashes["a"], hashes["b"]))
    outcome = command("export", "--policy", policy, "--model", other_toy, "--output-dir", "out")
    outcome.assert_refused("bitpolicy", "calibration was made from weights with sha256", "run search-policy on")
    assert not (here / "out").exists()


def load_unet(folder: Path) -> Any:
    return diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float16)


def test_export_refuses_a_policy_without_its_calibration(command: Any, finished: Any, toy: Path, here: Path) -> None:
    shutil.copy(finished.folder / "policy.yaml", here)
    outcome = command("export", "--policy", "policy.yaml", "--model", toy, "--output-dir", "out")
    outcome.assert_refused(
        "bitpolicy", "calibration.safetensors is missing", "keep the two together", "bias_correction"
    )
    assert "git-lfs" not in outcome.err
    assert [path.name for path in here.iterdir()] == ["policy.yaml"]


def test_export_refuses_the_calibration_of_another_search(command: Any, finished: Any, toy: Path, here: Path) -> None:
    policy = edited(finished, here / "mine")
    means = load_file(here / "mine" / "calibration.safetensors")
    save_file({name: tensor + 1 for name, tensor in means.items()}, here / "mine" / "calibration.safetensors")
    outcome = command("export", "--policy", policy, "--model", toy, "--output-dir", "out")
    outcome.assert_refused("bitpolicy", "has hash sha256:", "the policy was made with sha256:")
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        ("{", "is not YAML"),
        ("- a\n- b\n", "needed a mapping"),
        ("bitpolicy: 1\nmodle: {}\n", "modle"),
        (None, "cannot read policy"),
    ],
)
def test_export_refuses_anything_but_a_policy(
    command: Any, toy: Path, here: Path, content: str | None, needle: str
) -> None:
    if content is not None:
        (here / "policy.yaml").write_text(content)
    outcome = command("export", "--policy", "policy.yaml", "--model", toy, "--output-dir", "out")
    outcome.assert_refused("bitpolicy", "policy.yaml", needle)
    assert not (here / "out").exists()


def test_export_replaces_a_folder_only_with_overwrite(command: Any, finished: Any, toy: Path, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("mine")
    arguments = ("export", "--policy", finished.folder / "policy.yaml", "--model", toy, "--output-dir", "out")
    command(*arguments).assert_refused("bitpolicy", "out already exists", "--overwrite")
    assert [path.name for path in (here / "out").iterdir()] == ["mine.txt"]
    command(*arguments, "--overwrite").assert_refused("bitpolicy", "empty folder")
    assert (here / "out" / "mine.txt").read_text() == "mine", "only a pipeline is ever replaced"
    (here / "out" / "mine.txt").unlink()
    assert command(*arguments).code == 0
    command(*arguments).assert_refused("bitpolicy", "out already exists", "--overwrite")
    assert command(*arguments, "--overwrite").code == 0
    assert (here / "out" / UNET).is_file()
    assert [path.name for path in here.iterdir()] == ["out"]


# eval


def test_eval_measures_a_checkpoint_on_its_own_samples(
    command: Any, finished: Any, toy: Path, prompts: Path, here: Path
) -> None:
    arguments = ("eval", finished.folder / "checkpoint", "--model", toy, "--prompts", prompts, *CALL, "--images", "3")
    result = command(*arguments, "--picture", "pair.png", "--json").result
    assert set(result) == {"psnr_db", "compute"}
    psnr = result["psnr_db"]
    assert (psnr["n"], psnr["identical"]) == (3, 0)
    assert psnr["mean"] == pytest.approx(finished.outcome.result["psnr_db"]["mean"], abs=6)
    with Image.open(here / "pair.png") as picture:
        assert picture.width > 3 * 160
    text = command(*arguments)
    assert text.out == f"PSNR mean {psnr['mean']:.2f} dB, worst {psnr['min']:.2f} dB over 3 images\n"


def test_eval_of_the_unquantized_model_is_identical(
    command: Any, small: tuple[str, ...], toy: Path, prompts: Path, here: Path
) -> None:
    command("--budget", "99GB", *small, "--output-dir", "out")
    arguments = ("eval", "out/checkpoint", "--model", toy, "--prompts", prompts, *CALL, "--images", "2")
    assert command(*arguments, "--json").result["psnr_db"] == {"mean": None, "min": None, "n": 2, "identical": 2}
    assert command(*arguments).out == "all 2 images are identical\n"


def test_eval_refuses_anything_but_a_checkpoint(command: Any, toy: Path, here: Path) -> None:
    command("eval", "nothing", "--model", toy).assert_refused("bitpolicy", "nothing", "empty or missing")


# inspect


def test_inspect_lists_the_layers_of_a_model(command: Any, toy: Path, layer_names: list[str], finished: Any) -> None:
    found = command("inspect", toy, "--json").result
    assert [row["layer"] for row in found["layers"]] == layer_names
    assert f"{finished.outcome.result['reference_bytes']:,} bytes" in found["title"]
    (conv_in,) = [row for row in found["layers"] if row["layer"] == "conv_in"]
    assert conv_in == {
        "layer": "conv_in",
        "role": "input_stem",
        "stage": "ends",
        "shape": "16x4x3x3",
        "format": "fp16",
        "bytes": 16 * 4 * 9 * 2,
    }


def test_inspect_lists_the_formats_of_a_checkpoint(command: Any, finished: Any) -> None:
    found = command("inspect", finished.folder / "checkpoint", "--json").result
    formats = [row["format"] for row in found["layers"]]
    assert {name: formats.count(name) for name in ("int4", "int8", "fp16")} == finished.outcome.result["layers"]
    assert f"{finished.outcome.result['checkpoint_bytes']:,} bytes" in found["title"]
    weights = load_file(finished.folder / "checkpoint" / UNET)
    stored = {row["layer"]: row["bytes"] for row in found["layers"]}
    for layer, nbytes in stored.items():
        parts = [t.nbytes for n, t in weights.items() if n.startswith(f"{layer}.weight")]
        assert sum(parts) == nbytes


def test_inspect_lists_the_entries_of_a_policy(command: Any, finished: Any) -> None:
    found = command("inspect", finished.folder / "policy.yaml", "--json").result
    policy = yaml.safe_load((finished.folder / "policy.yaml").read_text())
    assert {row.pop("layer"): row for row in found["layers"]} == policy["layers"]
    assert "UNet2DConditionModel" in found["title"]


@pytest.mark.parametrize("what", ["toy", "checkpoint", "policy"])
def test_inspect_prints_a_table_for_people(command: Any, finished: Any, toy: Path, what: str) -> None:
    target = {"toy": toy, "checkpoint": finished.folder / "checkpoint", "policy": finished.folder / "policy.yaml"}
    outcome = command("inspect", target[what])
    assert (outcome.code, outcome.err) == (0, "")
    assert "conv_in" in outcome.out or what == "policy"
    assert "format" in outcome.out


def test_inspect_refuses_anything_else(command: Any, here: Path) -> None:
    command("inspect", "nothing").assert_refused("bitpolicy", "nothing", "no such folder")
    (here / "notes.txt").write_text(json.dumps(["a"]))
    command("inspect", "notes.txt").assert_refused("bitpolicy", "notes.txt")


def test_inspect_shows_the_kernel_of_each_packed_layer(command: Any, finished: Any) -> None:
    checkpoint = finished.folder / "checkpoint"
    found = command("inspect", checkpoint, "--kernels", "--json").result
    packed = [row for row in command("inspect", checkpoint, "--json").result["layers"] if row["format"] != "fp16"]
    rows = {row["layer"]: row for row in found["layers"]}
    assert {name: row["format"] for name, row in rows.items()} == {row["layer"]: row["format"] for row in packed}
    assert {row["compute"] for row in rows.values()} == {"exact"}
    assert {row["dtype"] for row in rows.values()} == {"float32"}
    names = {row.kernel.name for row in TABLE}
    assert {row["kernel"] for row in rows.values()} <= names
    assert all(row["why"] for row in rows.values())


def test_inspect_shows_another_compute_and_a_forced_kernel(
    command: Any, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPOLICY_KERNELS", "reference")
    found = command("inspect", finished.folder / "checkpoint", "--kernels", "--compute", "int8", "--json").result
    assert {row["kernel"] for row in found["layers"]} <= {"int8-reference", "reference"}
    assert "int8-reference" in {row["kernel"] for row in found["layers"]}
    assert {row["why"] for row in found["layers"]} == {"reference was requested"}


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--kernels"], ["--kernels needs a checkpoint", "the bundled pipeline is not one"]),
        (["{checkpoint}", "--kernels", "--compute", "int5"], ["unknown compute 'int5'", "exact, float, int8"]),
        (["{checkpoint}", "--kernels", "--device", "tpu"], ["unknown device 'tpu'"]),
    ],
)
def test_inspect_kernels_refuses_wrong_arguments(
    command: Any, finished: Any, arguments: list[str], needles: list[str]
) -> None:
    given = [argument.format(checkpoint=finished.folder / "checkpoint") for argument in arguments]
    command("inspect", *given).assert_refused("bitpolicy", *needles)


def test_an_unknown_kernel_in_the_environment_is_one_line(
    command: Any, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPOLICY_KERNELS", "quick")
    command("inspect", finished.folder / "checkpoint", "--kernels").assert_refused(
        "bitpolicy", "unknown kernel 'quick'"
    )
