"""A class-conditional consistency model of grey images, from the command line to compare.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_pipelines import TOYS

from bitpolicy.policies.policy import Policy


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy in a folder, and a file with eight of its classes."""
    folder = tmp_path_factory.mktemp("grey")
    TOYS["ConsistencyModelPipeline"].new().save_pretrained(folder / "model")
    (folder / "labels.txt").write_text("0\n17\n207\n3\n998\n999\n500\n64\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("probe", ["adjoint", "stepwise", "weight"])
def test_a_search_runs_from_labels_to_a_picture(command: Any, grey: Path, tmp_path: Path, probe: str) -> None:
    out, model = tmp_path / "out", grey / "model"
    about = ("--model", model, "--prompts", grey / "labels.txt", "--probe", probe)
    less = ("--trials", "0", "--remeasure", "0", "--quantizer", "rtn", "--json")
    outcome = command("search", "--budget", "90%", "--output-dir", out, *about, *less)  # embeddings stay as they are
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    result = outcome.result
    assert result["policy_bytes"] == result["checkpoint_bytes"] <= result["budget_bytes"]
    assert result["psnr_db"]["n"] == 16
    assert result["psnr_db"]["mean"] > 20
    policy = Policy.load(out / "policy.yaml")
    assert policy.provenance["call"] == {"num_inference_steps": 1}
    assert policy.provenance["probe"]["name"] == probe
    with Image.open(out / "compare.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    cell = pixels[32:192, -160 - 12 : -12]
    assert np.ptp(cell) > 10  # something is drawn,
    assert np.ptp(cell, axis=2).max() == 0  # in grey
