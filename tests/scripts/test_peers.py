"""The comparison with rivals: its samples, its intervals, and the threshold rule, checked by counting."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bitpolicy.kernels.formats.named import parse_formats
from bitpolicy.policies.accounting import ByteAccount

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("scripts_importable")


@pytest.fixture
def plan() -> Any:
    """Three layers of different sizes, with the parts of a plan that an assignment uses."""
    shapes = {"a": (8, 64), "b": (32, 64), "c": (4, 16, 3, 3)}
    layers = [SimpleNamespace(name=name, shape=shape) for name, shape in shapes.items()]
    account = ByteAccount(torch.float16, shapes, 100, 3000)
    return SimpleNamespace(layers=layers, formats=parse_formats(("int4", "int8", "fp16")), account=account)


PSNR = np.array([[20.0, 41.0, np.inf], [30.0, 52.0, np.inf], [25.0, 38.0, np.inf]])


def policies_of_thresholds(plan: Any) -> list[dict[str, Any]]:
    """The policy of each threshold, by the definition of the rule."""
    found = []
    for threshold in np.unique(PSNR[np.isfinite(PSNR)]):
        rows = [
            next(
                f for f, value in zip(plan.formats, row, strict=True) if value >= threshold
            )  # formats are sorted by bits
            for row in PSNR
        ]
        found.append({layer.name: f for layer, f in zip(plan.layers, rows, strict=True)})
    return found


@pytest.mark.parametrize("share", [0.4, 0.5, 0.6, 0.8])
def test_a_threshold_is_the_highest_that_fits(plan: Any, share: float) -> None:
    from peers.psnr_threshold import thresholded

    limit = share * plan.account.reference
    fits = [policy for policy in policies_of_thresholds(plan) if plan.account.total(policy) <= limit]
    assert thresholded(plan, PSNR, share) == (fits[-1] if fits else None)


def test_small_layers_stay_unquantized_if_requested(plan: Any) -> None:
    from peers.psnr_threshold import thresholded

    easy = np.array([[60.0, 61.0, np.inf]] * 3)
    found = thresholded(plan, easy, 0.9, least=8 * 64)
    assert found is not None
    assert {name: format.name for name, format in found.items()} == {"a": "fp16", "b": "int8", "c": "int8"}


def test_one_step_psnr_is_relative_to_the_peak() -> None:
    from peers.psnr_threshold import _psnr

    exact = torch.tensor([[[0.0, -4.0]], [[1.0, 2.0]]])
    changed = exact + torch.tensor([[[0.4, -0.4]], [[0.02, 0.02]]])
    assert _psnr(changed, exact) == pytest.approx((20 + 40) / 2, abs=1e-4)


def test_held_out_prompts_are_not_among_the_pipelines_own() -> None:
    own = (ROOT / "bitpolicy" / "prompts" / "emoji.txt").read_text().splitlines()
    held_out = (ROOT / "scripts" / "peers" / "held_out.txt").read_text().splitlines()
    assert len({*held_out}) == len(held_out) == 32
    assert not {*own} & {*held_out}


def test_intervals_are_over_prompts() -> None:
    """Repeating the images of two prompts eight times does not narrow the interval."""
    from peers.table import interval

    once = interval([40.0, 50.0], ["a", "b"])
    assert interval([40.0, 50.0] * 8, ["a", "b"] * 8) == once == (40.0, 50.0)
    many = [f"p{i}" for i in range(64)]
    values = list(np.random.default_rng(1).normal(30, 2, 64))
    low, high = interval(values, many)
    error = np.std(values, ddof=1) / 8
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_pieces_of_images_do_not_depend_on_how_many_are_requested() -> None:
    from peers.scoring import pieces

    samples = list(range(256))
    known = [list(piece) for piece in pieces(samples)]
    assert list(itertools.chain(*known)) == samples
    for count in (4, 16, 32, 64):
        assert [list(piece) for piece in pieces(samples[:count])] == known[: len(list(pieces(samples[:count])))]


def test_a_tool_runs_only_in_the_exact_version(tmp_path: Path) -> None:
    from bench_peers import tool_python

    version = np.__version__
    assert tool_python(tmp_path, f"numpy=={version}") == Path(sys.executable)
    assert tool_python(tmp_path, f"numpy=={version}.1") is None
    own = tmp_path / "bin" / "python"
    own.parent.mkdir()
    own.touch()
    assert tool_python(tmp_path, "no-such-package==1") == own


def test_the_plots_are_drawn_from_the_rows_of_the_page(tmp_path: Path) -> None:
    from peers.plot import MAIN, draw_all, draw_six, read_points

    points = read_points(ROOT / "docs" / "peers.md")
    sizes = {round(point.share) for point in points if point.family == "bitpolicy, all formats"}
    assert sizes == {30, 33, 38, 45}
    assert {*MAIN} <= {point.family for point in points}
    best = max(points, key=lambda point: point.metrics["psnr"][0])
    assert (best.family, best.setting) == ("bitpolicy, all formats", "ours-all@0.45")
    for draw in (draw_six, draw_all):
        draw(points, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_calls_are_recorded_under_the_denoisers_argument_names(tmp_path: Path) -> None:
    """Of a transformer, whose forward has other arguments than a U-Net's."""
    from peers.one_step import outputs, some_calls
    from peers.own_model import OUTPUT
    from peers.samples import plan_of, write_samples

    plan = plan_of(ROOT / "scripts" / "trained" / "lcm")
    write_samples(plan, tmp_path, trajectories=4)
    calls = some_calls(tmp_path, 4)
    assert {"sample", "timestep", "encoder_hidden_states", OUTPUT} <= set(calls)
    assert torch.allclose(outputs(plan.trajectories.denoisers[0], calls), calls[OUTPUT], atol=1e-5)


def test_the_judge_accepts_pictures_only_for_their_own_captions() -> None:
    from diffusers import DiffusionPipeline
    from scene_judge import shipped_judge, shown
    from scenes import unseen_captions
    from shipped_models import CALLS, drawings

    pipe = DiffusionPipeline.from_pretrained(ROOT / "scripts" / "trained" / "lcm", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scenes = unseen_captions(12)
    pictures = drawings(pipe, scenes, CALLS["lcm"])
    assert sum(shown(shipped_judge(), pictures, scenes)) >= 10
    assert sum(shown(shipped_judge(), pictures, [*scenes[1:], scenes[0]])) <= 1
    assert not any(shown(shipped_judge(), torch.zeros_like(pictures), scenes))
