"""`--compute int8` from the command to the images, and what each command reports about it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpolicy
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import packed_layers
from bitpolicy.pipelines.loading import load_source
from bitpolicy.pipelines.prompting import load_requests, split
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.calibration_file import load_calibration
from bitpolicy.search.quality.psnr import Psnr
from bitpolicy.sensitivity.table_files import read_table
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

CALL = ("--num-inference-steps", "2", "--guidance-scale", "1")
SIZES = ("--samples", "2", "--vectors", "1")


@pytest.fixture(scope="module")
def searched(command: Any, small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(what was printed, the folder) of a search like `finished`, under INT8 compute."""
    folder = tmp_path_factory.mktemp("int8") / "out"
    arguments = ("--budget", "50%", "--quantizer", "rtn", *small, "--compute", "int8", "--output-dir", str(folder))
    return command(*arguments, "--json"), folder


@pytest.fixture(scope="module")
def evaluate(command: Any, searched: Any, toy: Path, prompts: Path) -> Any:
    arguments = ("eval", searched[1] / "checkpoint", "--model", toy, "--prompts", prompts, *CALL, "--images", "4")
    return lambda *more: command(*arguments, *more)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sensitivity.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_search_records_int8_compute_everywhere(searched: Any) -> None:
    outcome, folder = searched
    assert (outcome.code, outcome.result["compute"]) == (0, "int8")
    assert Policy.load(folder / "policy.yaml").compute == "int8"
    config = json.loads((folder / "checkpoint" / "unet" / "config.json").read_text())
    assert config["quantization_config"]["compute"] == "int8"
    assert Policy.load(folder / "checkpoint" / "policy.yaml").compute == "int8"
    assert "`compute: int8`" in (folder / "checkpoint" / "README.md").read_text()
    layers = dict(packed_layers(bitpolicy.load_pipeline(folder / "checkpoint").unet))
    assert {layer.compute for layer in layers.values()} == {Compute.INT8}


def test_a_search_without_it_does_not_mention_it(finished: Any) -> None:
    assert finished.outcome.result["compute"] == "exact"
    assert "compute" not in (finished.folder / "policy.yaml").read_text()
    config = json.loads((finished.folder / "checkpoint" / "unet" / "config.json").read_text())
    assert "compute" not in config["quantization_config"]
    assert "inputs_share" not in rows(finished.folder)[0]


def test_the_table_has_the_share_of_the_inputs(searched: Any) -> None:
    table = read_table(searched[1] / "sensitivity.safetensors")
    assert table.compute is Compute.INT8
    assert table.inputs is not None
    found = [float(row["inputs_share"]) for row in rows(searched[1])]
    expected = (table.inputs / table.error.clamp(min=1e-300)).clamp(max=1).where(table.error > 0, 0)
    torch.testing.assert_close(torch.tensor(found).double(), expected.flatten(), atol=6e-5, rtol=0)
    of_int8 = expected[:, [f.name for f in table.formats].index("int8")]
    assert 0.1 < of_int8[of_int8 > 0].median() < 1


def test_the_measured_images_are_those_of_int8_compute(searched: Any, toy: Path, prompts: Path) -> None:
    """Drawn again in floats; the search measured its number with packed layers."""
    outcome, folder = searched
    source = load_source(str(toy))
    trajectories = Trajectories(source.pipe, ["unet"], {"num_inference_steps": 2, "guidance_scale": 1.0})
    samples = split(load_requests(prompts), 0, 16, 16, 16, 16).held_out
    policy = Policy.load(folder / "policy.yaml")
    choices = policy.resolve(name for name, _ in bitpolicy.kernels.layers.quantizable_layers(source.target))
    calibration = load_calibration(folder / "calibration.safetensors")
    reference = [image for image, _ in trajectories.images(samples)]
    found = {}
    for compute in (Compute.EXACT, Compute.INT8):
        with quantized(
            source.target,
            choices,
            quantization=Quantization(calibration=calibration, storage=source.storage, compute=compute),
        ):
            found[compute] = Psnr.of(reference, [image for image, _ in trajectories.images(samples)]).mean
    measured = outcome.result["psnr_db"]["mean"]
    assert measured == pytest.approx(found[Compute.INT8], abs=0.5)
    assert abs(measured - found[Compute.EXACT]) > 1
    assert policy.result is not None
    assert policy.result.psnr_db == round(measured, 2)


def test_eval_uses_the_recorded_compute_unless_another_is_given(evaluate: Any) -> None:
    recorded, int8, exact = (
        evaluate("--json", *more).result for more in ((), ("--compute", "int8"), ("--compute", "exact"))
    )
    assert recorded == int8
    assert (recorded["compute"], exact["compute"]) == ("int8", "exact")
    assert exact["psnr_db"]["mean"] > recorded["psnr_db"]["mean"] + 1
    assert evaluate().out.rstrip().endswith("over 4 images, compute int8")
    assert evaluate("--compute", "exact").out.rstrip().endswith("over 4 images")


def test_export_records_another_compute_and_drops_the_measured_quality(
    command: Any, finished: Any, toy: Path, here: Path
) -> None:
    policy = finished.folder / "policy.yaml"
    arguments = ("export", "--policy", policy, "--model", toy, "--output-dir")
    assert command(*arguments, "exact").code == command(*arguments, "int8", "--compute", "int8").code == 0
    assert Policy.load(here / "exact" / "policy.yaml") == Policy.load(policy)
    written = Policy.load(here / "int8" / "policy.yaml")
    assert written.compute == "int8"
    assert written.result is not None
    assert written.result.psnr_db is None
    layers = packed_layers(bitpolicy.load_pipeline("int8").unet)
    assert {layer.compute for _, layer in layers} == {Compute.INT8}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (here / "int8" / weights).read_bytes() == (here / "exact" / weights).read_bytes()


def test_a_probe_separates_the_share_of_the_inputs(command: Any, toy: Path, prompts: Path, here: Path) -> None:
    arguments = ("probe", "--model", toy, "--prompts", prompts, *CALL, *SIZES, "--quantizer", "rtn", "--remeasure", "0")
    outcome = command(*arguments, "--compute", "int8", "--output-dir", "int8")
    assert (outcome.code, outcome.err) == (0, "")
    assert "from inputs" in outcome.out
    exact = command(*arguments, "--output-dir", "exact")
    assert "from inputs" not in exact.out
    assert "inputs_share" in rows(here / "int8")[0]
    assert command("report", "int8").code == 0


def test_a_search_under_fp8_compute_is_measured_and_recorded_as_fp8(
    command: Any, small: tuple[str, ...], toy: Path, prompts: Path, here: Path
) -> None:
    under = ("--compute", "fp8", "--formats", "int4,fp8", "--quantizer", "rtn")
    outcome = command("--budget", "50%", *small, *under, "--output-dir", "out", "--json")
    assert (outcome.code, outcome.result["compute"]) == (0, "fp8")
    assert Policy.load(here / "out" / "policy.yaml").compute == "fp8"
    table = read_table(here / "out" / "sensitivity.safetensors")
    assert table.inputs is not None
    shares = table.inputs[:, [f.name for f in table.formats].index("fp8")]
    assert shares.count_nonzero() > 10
    assert not table.inputs[:, [f.name for f in table.formats].index("int4")].any()
    layers = [layer for _, layer in packed_layers(bitpolicy.load_pipeline("out/checkpoint").unet)]
    assert {layer.compute for layer in layers} == {Compute.FP8}
    assert {layer.format.name for layer in layers if layer.effective_compute is Compute.FP8} == {"fp8"}
    images = ("--prompts", prompts, *CALL, "--images", "2", "--json")
    fp8, exact = (
        command("eval", "out/checkpoint", "--model", toy, *images, *more).result
        for more in ((), ("--compute", "exact"))
    )
    assert (fp8["compute"], exact["compute"]) == ("fp8", "exact")
    assert fp8["psnr_db"]["mean"] != exact["psnr_db"]["mean"]


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (("search", "--budget", "50%", "--compute", "fp8"), ("int4, int8, fp16", "add fp8 to --formats")),
        (("probe", "--compute", "int4"), ("'int4'", "exact, int8, fp8, mxfp8, nvfp4")),
        (("search", "--budget", "50%", "--compute", "fast"), ("'fast'", "exact, int8, fp8, mxfp8, nvfp4")),
        (("search", "--budget", "50%", "--compute", "int8", "--scope", "peak"), ("--scope peak", "--compute exact")),
        (("eval", "CHECKPOINT", "--compute", "fast"), ("'fast'", "exact, float, int8, fp8, mxfp8, nvfp4")),
        (("eval", "CHECKPOINT", "--compute", "fp8"), ("no layer of", "compute fp8", "layers in fp8")),
        (
            ("export", "--policy", "POLICY", "--output-dir", "new", "--compute", "fp8"),
            ("fp8-tensor layers", "the policy has none", "search with fp8 among the formats"),
        ),
        (
            ("export", "--policy", "POLICY", "--output-dir", "new", "--compute", "fast"),
            ("'fast'", "exact, int8, fp8, mxfp8, nvfp4"),
        ),
        (
            ("export", "--policy", "POLICY", "--output-dir", "new", "--compute", "int8", "--target", "comfy"),
            ("--compute", "--target"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and len(value) > 2 else "",
)
def test_impossible_compute_modes_are_refused_in_one_line(
    command: Any, finished: Any, toy: Path, here: Path, arguments: tuple[str, ...], needles: tuple[str, ...]
) -> None:
    paths = {"CHECKPOINT": str(finished.folder / "checkpoint"), "POLICY": str(finished.folder / "policy.yaml")}
    named = [paths.get(argument, argument) for argument in arguments]
    command(*named, "--model", toy).assert_refused("bitpolicy", *needles)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["search", "probe", "export", "eval"])
def test_help_explains_compute(command: Any, name: str) -> None:
    text = " ".join(command(name, "--help").out.replace("│", " ").split())
    assert "--compute" in text
    assert "faster" in text
    assert ("VNNI" in text) == (name != "eval")


def test_compute_from_python(half_pipeline: Any, tmp_path: Path) -> None:
    about: dict[str, Any] = {
        "call": {"num_inference_steps": 2, "guidance_scale": 1.0},
        "prompts": ["cat", "dog"],
        "quantizer": "rtn",
        "quiet": True,
    }
    pipe = half_pipeline()
    exact = bitpolicy.probe(pipe, samples=2, vectors=1, **about)
    table = bitpolicy.probe(pipe, samples=2, vectors=1, compute="int8", **about)
    assert table.inputs is not None
    assert exact.inputs is None
    sizes = {"calibration_samples": 2, "vectors": 1, "trials": 0}
    policy = bitpolicy.search(pipe, "60%", compute="int8", **sizes, **about)
    assert policy.compute == "int8"
    assert bitpolicy.search(pipe, "60%", **sizes, **about).compute == "exact"
    bitpolicy.export(pipe, policy, tmp_path / "as it is")
    bitpolicy.export(pipe, policy, tmp_path / "exact", compute="exact")
    for folder, expected in (("as it is", Compute.INT8), ("exact", Compute.EXACT)):
        layers = packed_layers(bitpolicy.load_pipeline(tmp_path / folder).unet)
        assert {layer.compute for _, layer in layers} == {expected}
    with pytest.raises(bitpolicy.BitPolicyError, match="exact, int8, fp8, mxfp8, nvfp4"):
        bitpolicy.export(pipe, policy, tmp_path / "other", compute="float")
