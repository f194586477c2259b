"""`bitpolicy eval --metrics`: a table, strict JSON, remedies for what is unavailable, and mistakes before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitpolicy.cli import evaluate as module
from bitpolicy.kernels.kernel import Compute
from bitpolicy.loading import BUNDLED_FOLDER
from bitpolicy.search import networks

CALL = ("--num-inference-steps", "2", "--guidance-scale", "1")
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
    """Five pictures of chance."""
    folder = tmp_path / "real"
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_metrics_come_as_strict_json_beside_the_psnr(evaluate: Any) -> None:
    result = evaluate("--metrics", "psnr,ssim,latent", "--json").result
    assert list(result) == ["psnr_db", "compute", "metrics"]
    assert list(result["metrics"]) == ["psnr", "ssim", "latent"]
    psnr = result["metrics"]["psnr"]
    assert psnr["mean"] == pytest.approx(result["psnr_db"]["mean"], abs=1e-3)
    assert psnr["worst"] == pytest.approx(result["psnr_db"]["min"], abs=1e-3)
    assert len(psnr["per_image"]) == 3
    assert psnr["interval"][0] <= psnr["mean"] <= psnr["interval"][1]
    assert 0 < result["metrics"]["latent"]["mean"] < 1


def test_what_cannot_be_had_is_no_number(evaluate: Any) -> None:
    found = evaluate("--metrics", "all", "--json").result["metrics"]
    assert list(found) == ["psnr", "ssim", "lpips", "latent", "fid", "kid", "clip"]
    missing = {name: result for name, result in found.items() if "unavailable" in result}
    assert set(missing) == {"lpips", "fid", "kid", "clip"}
    assert all(set(result) == {"unavailable", "remedy"} for result in missing.values())


def test_a_table_for_people_says_what_is_missing_and_what_to_do(evaluate: Any) -> None:
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


def test_a_folder_of_real_images_asks_for_everything(evaluate: Any, real: Path) -> None:
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


def test_the_bundled_pipeline_brings_its_network(monkeypatch: pytest.MonkeyPatch, finished: Any, command: Any) -> None:
    """With the checkpoint's denoiser left out, as it is the toy's: what is looked at is which metrics there are."""
    monkeypatch.setattr(module, "swapped_denoiser", lambda *_: nullcontext(Compute.EXACT))
    call = ("--num-inference-steps", "1", "--guidance-scale", "1", "--images", "2", "--metrics", "lpips,fid,kid")
    found = command("eval", finished.folder / "checkpoint", *call, "--json").result["metrics"]
    assert [
        name for name, result in found.items() if "unavailable" not in result
    ] == "lpips-emoji fid-emoji kid-emoji".split()
    assert found["fid-emoji"]["to_reference"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (("--metrics", "fit"), "psnr, ssim, lpips, latent, fid, kid, clip"),
        (("--metrics", ""), "separated by commas"),
        (("--features", "nothing"), "--features nothing: there is no such file or folder"),
        (("--features", "empty"), "inception-2015-12-05.pt"),
        (("--real-images", "nothing"), "--real-images nothing: there is no such folder"),
        (("--real-images", "empty"), "has 0 pictures"),
        (("--real-images", "broken"), "is no picture"),
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
    monkeypatch.setattr(module, "load_source", lambda *_, **__: pytest.fail("a model was loaded"))
    evaluate(*arguments).assert_refused("bitpolicy", needle)
