"""`bitpolicy eval --metrics`: a table, strict JSON, remedies for unavailable metrics, and early refusal of mistakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bitpolicy.cli.running import evaluate as module
from bitpolicy.kernels.kernel import Compute
from bitpolicy.pipelines.loading import BUNDLED, BUNDLED_FOLDER
from bitpolicy.policies.policy import Policy
from bitpolicy.search.quality import networks

CALL = ("--num-inference-steps", "2", "--guidance-scale", "1")
UNET = "unet/diffusion_pytorch_model.safetensors"
EMOJI = BUNDLED_FOLDER / "features"


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / ".hub"))
    monkeypatch.setattr(networks, "_CLIPS", ("no-one/nothing",) * 3)


@pytest.fixture
def evaluate(command: Any, finished: Any, toy: Path, prompts: Path) -> Callable[..., Any]:
    """`evaluate(*arguments)`: three images of the toy, 16 x 16 pixels."""
    arguments = ("eval", finished.folder / "checkpoint", "--model", toy, "--prompts", prompts, *CALL, "--images", "3")
    return lambda *more: command(*arguments, *more)


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """Five random pictures."""
    folder = tmp_path / "real"
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_metrics_are_strict_json_next_to_the_psnr(evaluate: Any) -> None:
    result = evaluate("--metrics", "psnr,ssim,latent", "--json").result
    assert list(result) == ["psnr_db", "compute", "metrics"]
    assert list(result["metrics"]) == ["psnr", "ssim", "latent"]
    psnr = result["metrics"]["psnr"]
    assert psnr["mean"] == pytest.approx(result["psnr_db"]["mean"], abs=1e-3)
    assert psnr["worst"] == pytest.approx(result["psnr_db"]["min"], abs=1e-3)
    assert len(psnr["per_image"]) == 3
    assert psnr["interval"][0] <= psnr["mean"] <= psnr["interval"][1]
    assert 0 < result["metrics"]["latent"]["mean"] < 1


def test_unavailable_metrics_have_no_number(evaluate: Any) -> None:
    found = evaluate("--metrics", "all", "--json").result["metrics"]
    assert list(found) == ["psnr", "ssim", "lpips", "latent", "fid", "kid", "clip"]
    missing = {name: result for name, result in found.items() if "unavailable" in result}
    assert set(missing) == {"lpips", "fid", "kid", "clip"}
    assert all(set(result) == {"unavailable", "remedy"} for result in missing.values())


def test_the_table_names_what_is_missing_and_the_remedy(evaluate: Any) -> None:
    outcome = evaluate("--metrics", "psnr,fid")
    assert (outcome.code, outcome.err) == (0, "")
    assert "3 images, checkpoint against reference" in outcome.out
    psnr, fid = (next(line for line in outcome.out.splitlines() if f" {name} " in line) for name in ("psnr ↑", "fid"))
    assert " dB " in psnr
    assert "unavailable" in fid
    assert not any(character.isdigit() for character in fid)
    (remedy,) = [line for line in outcome.out.splitlines() if line.startswith("fid: ")]
    assert "inception-2015-12-05.pt is not here" in remedy
    assert "--features" in remedy


def test_a_folder_of_real_images_requests_all_metrics(evaluate: Any, real: Path) -> None:
    found = evaluate("--features", EMOJI, "--real-images", real, "--json").result["metrics"]
    assert list(found) == "psnr ssim lpips lpips-emoji latent fid fid-emoji kid kid-emoji clip".split()
    fid = found["fid-emoji"]
    assert (fid["n"], fid["n_real"], fid["features"], fid["network"]) == (3, 5, 128, "emoji")
    assert 0 < fid["to_reference"] < fid["reference_to_real"]
    assert fid["to_real"] > 0
    text = evaluate("--features", EMOJI, "--real-images", real, "--metrics", "fid,kid").out
    assert text.count("to 5 real ") == text.count("reference's own ") == 2
    assert f"{fid['to_reference']:.5g}" in text


def test_the_unquantized_model_has_no_distance(
    command: Any, small: tuple[str, ...], toy: Path, prompts: Path, here: Path
) -> None:
    command("--budget", "99GB", *small, "--output-dir", "out")
    arguments = ("eval", "out/checkpoint", "--model", toy, "--prompts", prompts, *CALL, "--images", "3")
    more = ("--features", EMOJI, "--metrics", "psnr,ssim,lpips,latent,fid,kid")
    found = command(*arguments, *more, "--json").result["metrics"]
    assert (found["psnr"]["mean"], found["psnr"]["identical"]) == (None, 3)
    assert found["ssim"]["mean"] == 1
    assert found["lpips-emoji"]["mean"] == found["latent"]["mean"] == 0
    assert found["fid-emoji"]["to_reference"] == pytest.approx(0, abs=1e-9)
    assert found["kid-emoji"]["to_reference"] == pytest.approx(0, abs=1e-9)
    assert "all identical" in command(*arguments, *more).out


def test_the_bundled_pipeline_includes_its_network(
    monkeypatch: pytest.MonkeyPatch, finished: Any, command: Any
) -> None:
    """The checkpoint's denoiser is left out, because it is the toy's. The test only looks at which metrics there
    are."""
    monkeypatch.setattr(module, "swapped_components", lambda *_: nullcontext(Compute.EXACT))
    call = ("--num-inference-steps", "1", "--guidance-scale", "1", "--images", "2", "--metrics", "lpips,fid,kid")
    outcome = command("eval", finished.folder / "checkpoint", "--model", BUNDLED, *call, "--json")
    (line,) = outcome.err.splitlines()
    assert "whose unet had sha256" in line
    assert "different model" in line
    found = outcome.result["metrics"]
    assert [
        name for name, result in found.items() if "unavailable" not in result
    ] == "lpips-emoji fid-emoji kid-emoji".split()
    assert found["fid-emoji"]["to_reference"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (("--metrics", "fit"), "psnr, ssim, lpips, latent, fid, kid, clip"),
        (("--metrics", ""), "'--metrics': it is empty"),
        (("--features", "nothing"), "--features nothing: there is no such file or folder"),
        (("--features", "empty"), "inception-2015-12-05.pt"),
        (("--real-images", "nothing"), "--real-images nothing: there is no such folder"),
        (("--real-images", "empty"), "has 0 pictures"),
        (("--real-images", "broken"), "is not a picture"),
        (("--seed", str(2**63)), "give a whole number from 0 to"),
    ],
)
def test_mistakes_are_refused_before_anything_is_drawn(
    evaluate: Any, here: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, str], needle: str
) -> None:
    (here / "empty").mkdir()
    (here / "broken").mkdir()
    for name in "ab":
        (here / "broken" / f"{name}.png").write_text(json.dumps("no picture"))
    monkeypatch.setattr(module, "load_reference", lambda *_, **__: pytest.fail("a model was loaded"))
    evaluate(*arguments).assert_refused("bitpolicy", needle)


# What it is compared with


def test_it_is_compared_with_the_model_that_the_checkpoint_was_made_from(
    command: Any, evaluate: Any, finished: Any, prompts: Path
) -> None:
    arguments = ("eval", finished.folder / "checkpoint", "--prompts", prompts, *CALL, "--images", "3", "--json")
    outcome = command(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.result["psnr_db"] == evaluate("--json").result["psnr_db"]


@pytest.fixture
def moved(finished: Any, toy: Path, here: Path) -> Callable[..., Path]:
    """`moved(id=...)`: a copy of the checkpoint whose policy records another model."""
    shutil.copytree(finished.folder / "checkpoint", here / "copy")
    policy = Policy.load(here / "copy" / "policy.yaml")

    def changed(**entries: str) -> Path:
        model = policy.model.model_copy(update=entries)
        policy.model_copy(update={"model": model}).save(here / "copy" / "policy.yaml")
        return here / "copy"

    return changed


def test_the_images_come_from_all_components_of_the_checkpoint(
    command: Any, finished: Any, toy: Path, prompts: Path, tmp_path: Path
) -> None:
    """Including its text encoder and scheduler, which are not those of the model it is compared with."""
    checkpoint = shutil.copytree(finished.folder / "checkpoint", tmp_path / "checkpoint")
    arguments = ("eval", checkpoint, "--model", toy, "--prompts", prompts, *CALL, "--images", "2", "--json")
    before = command(*arguments).result["psnr_db"]["mean"]
    weights = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    refused = command(*arguments)
    assert refused.code == 2
    assert "SHA-256 differs" in refused.err
    (checkpoint / "bitpolicy.json").unlink()
    assert command(*arguments).result["psnr_db"]["mean"] < before - 3


def test_a_missing_model_is_refused_with_the_remedy(command: Any, moved: Any, toy: Path, prompts: Path) -> None:
    folder = moved(id="/nowhere/toy")
    command("eval", folder).assert_refused("bitpolicy", "was made from /nowhere/toy", "no such folder", "with --model")
    named = command("eval", folder, "--model", toy, "--prompts", prompts, *CALL, "--images", "2")
    assert (named.code, named.err) == (0, "")


def test_a_changed_model_is_refused_or_accepted_with_a_warning_if_named(
    command: Any, moved: Any, toy: Path, here: Path, prompts: Path
) -> None:
    shutil.copytree(toy, here / "later")
    weights = load_file(here / "later" / UNET)
    weights["conv_out.weight"][0, 0, 0, 0] += 1
    save_file(weights, here / "later" / UNET, metadata={"format": "pt"})
    folder = moved(id=str(here / "later"))
    refused = command("eval", folder, "--prompts", prompts, *CALL, "--images", "2")
    refused.assert_refused("bitpolicy", "made from", "later, whose unet had sha256", "changed since", "--model")
    named = command("eval", folder, "--model", here / "later", "--prompts", prompts, *CALL, "--images", "2")
    assert named.code == 0
    assert named.err.startswith("warning: ")
    assert "different model" in named.err


def test_a_checkpoint_without_a_recorded_model_needs_one(command: Any, moved: Any, toy: Path, prompts: Path) -> None:
    folder = moved()
    (folder / "policy.yaml").unlink()
    command("eval", folder).assert_refused("bitpolicy", "has no policy.yaml", "with --model")
    assert command("eval", folder, "--model", toy, "--prompts", prompts, *CALL, "--images", "2").code == 0


@pytest.mark.parametrize("more", [(), ("--model", "toy")])
def test_a_pipeline_that_bitpolicy_did_not_pack_is_refused(command: Any, toy: Path, more: tuple[str, ...]) -> None:
    outcome = command("eval", toy, *(str(toy) if word == "toy" else word for word in more))
    outcome.assert_refused("bitpolicy", str(toy), "bitpolicy did not pack", "`bitpolicy export` wrote")
