"""The report on a search's folder: its result, its images, the format of every layer, and the trials."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, all_formats, format_named
from bitpolicy.policies.policy import Policy
from bitpolicy.report import charts, chosen, policy_map
from bitpolicy.report.document import make_report
from bitpolicy.report.inputs import Probed
from bitpolicy.search.study.trials import TrialRow, load_trials, save_trials
from bitpolicy.sensitivity.probes.error_split import ErrorSplit


@pytest.fixture(scope="module")
def probed(finished: Any) -> Probed:
    return Probed.load(finished.folder)


@pytest.fixture(scope="module")
def page(finished: Any) -> Any:
    return make_report(finished.folder)


@pytest.fixture
def folder(finished: Any, tmp_path: Path) -> Path:
    """A copy of the search without its checkpoint and its probe's records."""
    return shutil.copytree(finished.folder, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint", "work"))


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


# The section


def test_a_search_is_shown_with_its_result(page: Any, finished: Any) -> None:
    result, text = finished.outcome.result, text_of(page.html)
    psnr = result["psnr_db"]
    assert f"mean {psnr['mean']:.2f} dB, worst {psnr['min']:.2f} dB over 16 images" in text
    assert f"{result['policy_bytes']:,}" in text
    for name, count in result["layers"].items():
        assert count == 0 or f"{count} {name}" in text
    assert result["chosen"] in text


def test_a_search_is_shown_with_its_pictures(page: Any, finished: Any) -> None:
    pictures = {picture.name: picture for picture in page.pictures}
    assert {"compare", "policy-map", "trials"} <= set(pictures)
    assert pictures["compare"].png == (finished.folder / "compare.png").read_bytes()
    assert len(re.findall("<img ", page.html)) == len(page.pictures)


def test_a_probe_has_no_such_section(folder: Path) -> None:
    (folder / "policy.yaml").unlink()
    report = make_report(folder)
    assert "What the search chose" not in report.html
    assert not {"compare", "policy-map", "trials"} & {picture.name for picture in report.pictures}


def test_a_search_that_is_not_finished_says_so(folder: Path) -> None:
    for name in ("result.json", "compare.png", "trials.csv"):
        (folder / name).unlink()
    policy = Policy.load(folder / "policy.yaml")
    assert policy.result is not None
    policy.model_copy(update={"result": policy.result.model_copy(update={"psnr_db": None})}).save(
        folder / "policy.yaml"
    )
    report = make_report(folder)
    assert "not measured; the search has not finished" in text_of(report.html)
    assert {"compare", "trials"}.isdisjoint(picture.name for picture in report.pictures)


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"trials": 0, "won": "the exact solution"}, "Chosen: the exact solution. No study ran."),
        ("the budget holds all of it unquantized", "Chosen: the budget holds all of it unquantized. No study ran."),
        (
            {"target": "45.00 dB", "fresh_seeds": "45.10 dB", "policies_measured": 7},
            "7 policies of other sizes",
        ),
    ],
    ids=["no trials", "nothing to do", "a target"],
)
def test_a_choice_without_a_study_is_explained(folder: Path, search: Any, said: str) -> None:
    (folder / "trials.csv").unlink()
    policy = Policy.load(folder / "policy.yaml")
    changed = policy.model_copy(update={"provenance": {**policy.provenance, "search": search}})
    changed.save(folder / "policy.yaml")
    assert said in text_of(make_report(folder).html)


@pytest.mark.parametrize("name", ["result.json", "trials.csv"])
def test_a_damaged_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{,\n1,2\n")
    with pytest.raises(BitPolicyError, match=f"cannot read .*{name}: .*; .* the same search again"):
        make_report(folder)


# The map


def strips(probed: Probed, formats: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many strips are drawn in each colour."""
    drawn: Counter[str] = Counter()

    def rectangle(*args: Any, facecolor: str, **kwargs: Any) -> Rectangle:
        drawn[facecolor] += 1
        return Rectangle(*args, facecolor=facecolor, **kwargs)

    monkeypatch.setattr(policy_map, "Rectangle", rectangle)
    assert policy_map.policy_map(probed, formats).png.startswith(b"\x89PNG")
    return drawn


def test_the_map_has_a_strip_for_each_layer_in_the_colour_of_its_width(
    probed: Probed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert probed.policy is not None
    formats = {n: c.format for n, c in probed.policy.resolve(layer.name for layer in probed.layers).items()}
    widths = Counter({"int4": 4, "int8": 8, "fp16": 16}[format.name] for format in formats.values())
    assert strips(probed, formats, monkeypatch) == {policy_map.COLORS[bits]: n for bits, n in widths.items()}


def test_every_format_has_a_colour(probed: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [format_named("int8-convrot"), *all_formats()]
    formats = {layer.name: every[i * 7 % len(every)] for i, layer in enumerate(probed.layers)}
    assert sum(strips(probed, formats, monkeypatch).values()) == len(probed.layers)


def test_the_map_counts_the_bytes_of_each_block(probed: Probed) -> None:
    shown = policy_map._mapped(probed, {layer.name: format_named("int8") for layer in probed.layers})
    assert sum(len(here) for here in shown.cells.values()) == len(probed.layers)
    account = probed.account
    assert sum(ours for ours, _ in shown.nbytes.values()) == sum(
        account.layer(layer.name, format_named("int8")) for layer in probed.layers
    )
    assert sum(plain for _, plain in shown.nbytes.values()) == sum(account.layer(x.name, FP16) for x in probed.layers)
    assert shown.blocks.index("down_blocks.1") < shown.blocks.index("up_blocks.0")


# The trials

ROWS = [
    TrialRow(0, "the exact solution", 1e-4, 40.0, 4, False, None),
    TrialRow(1, "start 1", 2e-4, 37.0, 2, True, None),
    TrialRow(2, "", 9e-5, 40.5, 4, False, None),
    TrialRow(3, "", 1e-4, 40.0, 4, False, 0),
    TrialRow(4, "", 0.0, None, 4, False, None),
]


def test_trials_are_read_as_they_were_written(tmp_path: Path) -> None:
    save_trials(ROWS, tmp_path / "trials.csv")
    assert load_trials(tmp_path / "trials.csv") == ROWS


def test_a_search_writes_every_trial(finished: Any) -> None:
    rows = load_trials(finished.folder / "trials.csv")
    assert [row.number for row in rows] == [0, 1]
    assert rows[0].start == "the exact solution"
    assert all(row.samples == 16 for row in rows if not row.stopped)
    journal = [json.loads(line) for line in (finished.folder / "study.journal").read_text().splitlines()]
    values = [entry["values"][0] for entry in journal if entry.get("values")]
    assert [row.score for row in rows] == values


def test_the_table_of_trials_describes_each_one(folder: Path) -> None:
    save_trials(ROWS, folder / "trials.csv")
    text = text_of(make_report(folder).html)
    assert "0 the exact solution 0.0001 40.00 4" in text
    assert "1 start 1 0.0002 37.00 2, stopped" in text
    assert "3 the policy of trial 0 0.0001 40.00 4" in text
    assert "identical" in text


# Legends


def drawn_figures(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[Figure]:
    """Every figure that a module draws from now on, in its final state."""
    figures: list[Figure] = []
    original = module.picture

    def kept(name: str, alt: str, draw: Any, width: float, height: float) -> Any:
        def both(figure: Figure) -> None:
            draw(figure)
            figures.append(figure)

        return original(name, alt, both, width, height)

    monkeypatch.setattr(module, "picture", kept)
    return figures


def assert_legends_are_whole(figure: Figure) -> None:
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    assert figure.legends
    for legend in figure.legends:
        box, page = legend.get_window_extent(), figure.bbox
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
        overlaps = [axes for axes in figure.axes if axes.get_tightbbox().y0 < box.y1]
        assert overlaps == []


def test_legends_of_skips_and_steps_are_whole(probed: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn_figures(monkeypatch, charts)
    parts = torch.rand(2, 1 + 3, *probed.table.error.shape)
    split = ErrorSplit(parts, parts, parts, parts, parts[:, 1:], parts[:, 1:])
    charts.skips(probed, split)
    charts.through_the_sampler(probed, split)
    assert len(figures) == 2
    for figure in figures:
        assert_legends_are_whole(figure)


def test_the_legend_of_the_map_is_whole_with_many_formats(probed: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn_figures(monkeypatch, policy_map)
    every = all_formats()
    policy_map.policy_map(probed, {layer.name: every[i * 7 % len(every)] for i, layer in enumerate(probed.layers)})
    assert_legends_are_whole(figures[0])


def test_a_picture_of_identical_trials_is_drawn(probed: Probed) -> None:
    assert probed.policy is not None
    same = [replace(row, psnr_db=None) for row in ROWS]
    assert chosen._trials(same, probed.policy).png.startswith(b"\x89PNG")
