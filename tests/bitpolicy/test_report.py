"""The report: its numbers follow from the table that it is made from."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from bitpolicy.check import Check, CheckedPolicy
from bitpolicy.cli import main
from bitpolicy.cli.commands import report
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.kernel import Compute
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.policy_records import ModelReference
from bitpolicy.report.decisions import decisions
from bitpolicy.report.document import Report, make_report
from bitpolicy.report.drawing import step_ticks
from bitpolicy.report.groups import by_path, by_role, by_stage, running_order
from bitpolicy.report.heat_map import _labels, heat_map
from bitpolicy.report.inputs import Probed
from bitpolicy.report.lists import make_lists
from bitpolicy.report.page import paragraph, table
from bitpolicy.report.sections import composition, overview
from bitpolicy.report.shares import claims, correction_sentence, layer_medians, shares, shares_by_role
from bitpolicy.report.steps import amplification, coherence, entering
from bitpolicy.sensitivity.cost.forwards import Cost
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.probes.error_split import ErrorSplit
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.table_files import ModelContext, write_table

INT4, INT8 = format_named("int4"), format_named("int8")
FORMATS = (INT4, INT8)
STEPS = 4
NAMES = {  # name -> role, stage
    "conv_in": ("input_stem", "ends"),
    "time_embedding.linear_1": ("timestep_embedding", "ends"),
    "down_blocks.0.resnets.0.conv1": ("conv", "encoder"),
    "down_blocks.0.resnets.0.conv2": ("conv", "encoder"),
    "up_blocks.0.resnets.0.conv1": ("conv", "decoder"),
    "up_blocks.0.attentions.0.proj_out": ("projection", "decoder"),
    "mid_block.resnets.0.conv1": ("conv", "middle"),
    "conv_out": ("output_head", "ends"),
}
PLACE = {name: place for place, name in enumerate(NAMES)}


def layer(name: str, role: str, stage: str) -> Layer:
    return Layer(name, "Linear", (64, 64), True, role, stage)


def model_of(layers: Sequence[Layer]) -> ModelContext:
    shapes = {one.name: one.shape for one in layers}
    return ModelContext(list(layers), ByteAccount(torch.float16, shapes, 1000, 4096 * len(layers) + 500))


def table_of(error: torch.Tensor, probe: str = "adjoint", **changes: object) -> SensitivityTable:
    names = tuple(f"layer.{i}" for i in range(len(error))) if len(error) != len(NAMES) else tuple(NAMES)
    error = error.double()
    sketches = error.sqrt().float().expand(3, *error.shape).clone()
    corrected = torch.ones_like(error, dtype=torch.bool)
    found = SensitivityTable(probe, names, FORMATS[: error.shape[1]], error, corrected, sketches)
    return replace(found, cost=Cost(80, 560, 20, 1600), **changes)  # type: ignore[arg-type]


def errors(int4: float = 1e-4, int8: float = 1e-6, **special: float) -> torch.Tensor:
    """The same errors for every layer, except the INT4 errors of layers named in `special` (dots as double
    underscores)."""
    error = torch.tensor([[int4, int8]] * len(NAMES), dtype=torch.float64)
    for name, value in special.items():
        error[PLACE[name.replace("__", ".")], 0] = value
    return error


def split_of(
    error: torch.Tensor, bias: tuple[float, float], scale: float = 0.1, kept: float = 0.25, steps: int = STEPS
) -> ErrorSplit:
    """Errors that enter in equal parts at all steps. Shares `bias` of INT4 and INT8, equal for all layers; correction
    leaves `kept` of the bias and all the rest."""
    plain = error.float().expand(1 + steps, *error.shape).clone()
    plain[1:] /= steps
    shares = torch.tensor(bias[: error.shape[1]])
    biases = torch.stack([plain * shares, plain * shares * kept])
    scales = torch.stack([plain * scale] * 2)
    whole = torch.stack([plain, plain - biases[0] + biases[1]])
    amplified = torch.linspace(0.5, 2, steps)[:, None, None].expand(2, steps, *error.shape).clone()
    return ErrorSplit(whole, scales, biases, biases + scales, whole[:, 1:] * 2, amplified)


def check_of(found: SensitivityTable, factor: float = 1.25) -> Check:
    """Measurements that are `factor` times the predictions."""
    unlike = found.error * torch.linspace(1, 1.01, len(found.layers), dtype=torch.float64)[:, None]
    share = torch.full_like(found.error, 0.125).tolist()
    policies = []
    for i in range(6):
        guess, real = 1e-5 * i, factor * 1e-5 * i
        policies.append(CheckedPolicy(1000 * i, guess, guess, guess, real, real, 40.0 - i, 0.5))
    policies[0] = replace(policies[0], psnr_db=None, bias=0.0)
    policies[5] = replace(policies[5], psnr_db=12.0)
    measured = (unlike * factor).tolist()
    return Check(found.layers, ("int4", "int8"), unlike.tolist(), measured, share, share, tuple(policies), 4321)


def probed_of(error: torch.Tensor, **parts: object) -> Probed:
    layers = [layer(name, *place) for name, place in NAMES.items()]
    return Probed(table_of(error), model_of(layers), **parts)  # type: ignore[arg-type]


def save(probed: Probed, folder: Path) -> Path:
    write_table(probed.table, folder, probed.model)
    if probed.split is not None:
        probed.split.save(folder / "split.safetensors")
    if probed.check is not None:
        probed.check.save(folder / "check.json")
    return folder


@pytest.fixture(scope="module")
def whole() -> Probed:
    """Everything that a probe can write; `conv_out` is far worse than the rest."""
    error = errors(conv_out=1e-2)
    return probed_of(error, split=split_of(error, (0.8, 0.2)), check=check_of(table_of(error)))


@pytest.fixture(scope="module")
def kept(whole: Probed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, which no test may change."""
    return save(whole, tmp_path_factory.mktemp("kept") / "probe")


@pytest.fixture(scope="module")
def made(kept: Path) -> Report:
    return make_report(kept)


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(kept, tmp_path / "probe")


def text_of(html: str) -> str:
    """What a reader sees, in one line."""
    body = re.sub(r"<(style|script)\b.*?</\1>", "", html, flags=re.DOTALL)
    plain = re.sub(r"<[^>]+>", " ", body)
    for entity, letter in (("&gt;", ">"), ("&lt;", "<"), ("&#x27;", "'"), ("&quot;", '"'), ("&amp;", "&")):
        plain = plain.replace(entity, letter)
    return " ".join(plain.split())


# Which layers may be INT4


def brute_force(probed: Probed, budget: int) -> tuple[float, tuple[int, ...]]:
    """The least additive error of all policies that fit."""
    formats = (*FORMATS, FP16)
    best = (math.inf, ())
    for picked in itertools.product(range(3), repeat=len(probed.layers)):
        nbytes = 1000 + sum(probed.layer_bytes(i, formats[f]) for i, f in enumerate(picked))
        error = sum(probed.table.score(i, formats[f]) for i, f in enumerate(picked))
        if nbytes <= budget and error < best[0]:
            best = (error, picked)
    return best


def test_a_layer_that_int4_would_ruin_is_never_int4(whole: Probed) -> None:
    lists = make_lists(whole, "40%")
    error, picked = brute_force(whole, lists.budget.nbytes)
    assert lists.error == pytest.approx(error, rel=1e-3)
    (never,) = lists.never
    assert never.layer.name == "conv_out"
    chosen = whole.table.score(PLACE["conv_out"], (*FORMATS, FP16)[picked[PLACE["conv_out"]]])
    assert never.cost == pytest.approx(10 * math.log10((error - chosen + 1e-2) / error), rel=1e-3)
    assert never.own >= never.cost


def test_a_layer_that_int4_leaves_alone_is_free_whatever_was_chosen() -> None:
    lists = make_lists(probed_of(errors(mid_block__resnets__0__conv1=1e-9)), "40%")
    assert [m.layer.name for m in lists.free] == ["mid_block.resnets.0.conv1"]
    others = [m for m in lists.layers if m.chosen == INT4 and not m.free]
    assert others  # they are INT4 already, so INT4 costs nothing more; but free they are not
    assert all(m.cost == 0 and m.verdict == "between" for m in others)


@pytest.mark.parametrize(("decibels", "verdict"), [(0.9, "between"), (1.1, "never")])
def test_the_line_is_drawn_at_one_decibel(decibels: float, verdict: str) -> None:
    """The bytes of all INT8 and no more: E = 8e-6, and an INT4 error that adds this many decibels to it."""
    worse = 1e-6 + 8e-6 * (10 ** (decibels / 10) - 1)
    probed = probed_of(errors(mid_block__resnets__0__conv1=worse))
    lists = make_lists(probed, f"{probed.nbytes(INT8)}B")
    assert {m.chosen for m in lists.layers} == {INT8}
    marked = lists.layers[PLACE["mid_block.resnets.0.conv1"]]
    assert marked.cost == pytest.approx(decibels)
    assert marked.verdict == verdict


@pytest.mark.parametrize("budget", ["30%", "40%", "60%", "80%"])
def test_every_layer_has_the_decibels_of_its_definition(whole: Probed, budget: str) -> None:
    lists = make_lists(whole, budget)
    for marked in lists.layers:
        chosen, small = whole.table.score(marked.place, marked.chosen), whole.table.score(marked.place, INT4)
        assert marked.cost == pytest.approx(10 * math.log10((lists.error - chosen + small) / lists.error), abs=1e-9)
        assert marked.never == (lists.error - chosen + small > 10**0.1 * lists.error)
    assert sum(lists.counts.values()) == len(lists.layers)
    assert lists.nbytes <= lists.budget.nbytes


def test_the_hand_written_list_is_the_time_embedding_and_the_ends(whole: Probed) -> None:
    lists = make_lists(whole, "60%")
    assert [m.layer.name for m in lists.by_hand] == ["conv_in", "time_embedding.linear_1", "conv_out"]
    assert lists.pinned_db is not None
    assert lists.pinned_db >= -1e-3
    pinned = make_lists(whole, "35%").pinned_db
    assert pinned is None  # three of eight layers at FP16 alone take more than that


def listed(probed: Probed, budget: str | None) -> str:
    return text_of(decisions(probed, make_lists(probed, budget), Path("out")).body)


def test_a_budget_that_holds_everything_leaves_nothing_to_list(whole: Probed) -> None:
    assert make_lists(whole, "100%").error == 0
    assert "there is nothing to compare" in listed(whole, "100%")


def test_the_default_budget_is_named(whole: Probed) -> None:
    assert "45% of FP16 (the default: " in listed(whole, None)
    assert "the default: " not in listed(whole, "45%")


def test_the_lists_are_in_the_page(whole: Probed, made: Report) -> None:
    assert listed(whole, None) in text_of(made.html)
    never = make_lists(whole, None).never
    assert f"Never INT4: {len(never)} of 8 layers" in listed(whole, None)
    assert f"conv_out output_head ends 8,192 {never[0].chosen.name} {never[0].cost:.2f}" in listed(whole, None)


# Bias and noise


@pytest.mark.parametrize("corrected", [0, 1])
@pytest.mark.parametrize("column", [0, 1])
def test_shares_add_up_to_one(whole: Probed, corrected: int, column: int) -> None:
    assert whole.split is not None
    for found in shares_by_role(whole, whole.split, corrected, column).values():
        assert sum(found.parts) == pytest.approx(1)
        assert min(found.parts) >= 0


def test_shares_are_those_of_the_split(whole: Probed) -> None:
    assert whole.split is not None
    bias = whole.split.bias.clone()
    bias[:, 1:] = 0  # of single steps: not of the whole trajectory
    plain, fixed = (shares(replace(whole.split, bias=bias), corrected, 0) for corrected in (0, 1))
    assert plain.parts == pytest.approx((0.8, 0.1, 0.1), rel=1e-5)
    assert fixed.parts == pytest.approx((0.5, 0.25, 0.25), rel=1e-5)  # 0.2, 0.1, 0.1 of 0.4
    assert layer_medians(whole.split, 0, 0).parts == pytest.approx((0.8, 0.1, 0.1), rel=1e-5)
    assert "takes 4.0 dB off INT4's" in correction_sentence(whole, whole.split)
    assert "leaves 25% of the bias" in correction_sentence(whole, whole.split)


def test_a_layer_counts_by_its_error(whole: Probed) -> None:
    """One layer that errs a hundred times as much decides the share of its role, and is one of many in the median."""
    assert whole.split is not None
    bias = whole.split.bias.clone()
    bias[:, :, PLACE["conv_out"]] = 0
    split = replace(whole.split, bias=bias)
    assert shares(split, 0, 0).bias < 0.1
    assert layer_medians(split, 0, 0).bias == pytest.approx(0.8)


def test_no_error_has_no_shares(whole: Probed) -> None:
    split = split_of(torch.zeros(len(NAMES), 2), (0.8, 0.2))
    assert shares(split, 0, 0).parts == (0, 0, 0)
    assert [claim.holds for claim in claims(whole, split)] == [False, False]


@pytest.mark.parametrize(
    ("bias", "int4", "int8"),
    [
        ((0.8, 0.2), "INT4 is a bias: confirmed", "INT8 is a noise: confirmed"),
        ((0.2, 0.2), "INT4 is a bias: refuted", "INT8 is a noise: confirmed"),
        ((0.8, 0.8), "INT4 is a bias: confirmed", "INT8 is a noise: refuted"),
        ((0.2, 0.8), "INT4 is a bias: refuted", "INT8 is a noise: refuted"),
    ],
)
def test_the_verdict_follows_the_numbers(bias: tuple[float, float], int4: str, int8: str) -> None:
    error = errors()
    split = split_of(error, bias)
    probed = probed_of(error, split=split)
    text = text_of(composition(probed, Path("out")).body)
    assert f"{int4}. Without bias correction, its error is {bias[0]:.0%} bias, 10% scale" in text
    assert f"{int8}. Without bias correction, its error is {bias[1]:.0%} bias, 10% scale" in text
    assert [claim.holds for claim in claims(probed, split)] == ["confirmed" in int4, "confirmed" in int8]


def test_it_says_how_the_policy_was_chosen() -> None:
    probed = probed_of(errors())
    study = {"trials": 24, "won": "the exact solution", "best_of_study_held": False}
    chosen = replace(probed, policy=Policy.model_construct(provenance={"search": study}))
    assert "best of 24 trials was worse on fresh seeds" in text_of(overview(chosen, Path("out")).body)
    assert "fresh seeds" not in text_of(overview(probed, Path("out")).body)


def test_formats_are_ordered_by_their_bytes_not_by_their_column() -> None:
    error = errors().flip(1)
    layers = [layer(name, *place) for name, place in NAMES.items()]
    found = Probed(replace(table_of(error), formats=(INT8, INT4)), model_of(layers), split_of(error, (0.2, 0.8)))
    assert found.formats == FORMATS
    assert "INT4 is a bias: confirmed" in text_of(composition(found, Path("out")).body)


# Steps


def test_steps_that_agree_and_independent_steps() -> None:
    steps = torch.full((STEPS, 3), 2.0)
    agreeing = coherence(torch.cat([torch.full((1, 3), 2.0 * STEPS**2), steps]))
    independent = coherence(torch.cat([torch.full((1, 3), 2.0 * STEPS), steps]))
    assert agreeing is not None
    assert independent is not None
    assert (agreeing.found, agreeing.limit, agreeing.agreement) == pytest.approx((STEPS, STEPS, 1))
    assert (independent.found, independent.agreement) == pytest.approx((1, 0))
    one = coherence(torch.tensor([[3.0], [3.0], [0.0]]))
    assert one is not None
    assert (one.found, one.limit, one.agreement) == pytest.approx((1, 1, 0))
    assert coherence(torch.zeros(3, 1)) is None


def test_amplification_and_entry_by_step(whole: Probed) -> None:
    assert whole.split is not None
    assert amplification(whole, whole.split, 0) == pytest.approx(np.linspace(0.5, 2, STEPS))
    in_all = entering(whole, whole.split, 0)
    assert in_all == pytest.approx(whole.split.error[1, 1:, :, 0].sum(1).numpy(), rel=1e-5)  # biases are corrected
    stages = [entering(whole, whole.split, 0, stage) for stage in by_stage(whole)]
    assert np.sum(stages, 0) == pytest.approx(in_all)


def test_the_better_bias_is_shown(whole: Probed) -> None:
    corrected = whole.table.corrected.clone()
    corrected[0] = False
    found = replace(whole, table=replace(whole.table, corrected=corrected))
    values = torch.stack([torch.zeros_like(corrected), torch.ones_like(corrected)])
    assert found.better_bias(values).tolist() == corrected.tolist()


# Groups


def test_groups_hold_every_layer_once(whole: Probed) -> None:
    for groups in (by_role(whole), by_stage(whole)):
        assert sorted(i for g in groups for i in g.members) == list(range(len(NAMES)))
        assert np.sum([g.share for g in groups], 0) == pytest.approx([1, 1])
        assert sum(g.nbytes for g in groups) == len(NAMES) * 8192
    assert by_role(whole)[0].name == "output_head"
    conv = next(g for g in by_role(whole) if g.name == "conv")
    assert (conv.total[0], conv.median[0]) == pytest.approx((4e-4, 1e-4))


def test_the_page_has_the_share_of_8_bit_inputs(tmp_path: Path, made: Report) -> None:
    """Half of INT8's error and a two-hundredth of INT4's, except for a layer with short rows, which has none."""
    error = errors(int4=1e-4, int8=1e-6)
    inputs = torch.full_like(error, 5e-7)
    inputs[PLACE["conv_out"]] = 0
    probed = probed_of(error)
    probed = replace(probed, table=replace(probed.table, inputs=inputs, compute=Compute.INT8))
    text = text_of(make_report(save(probed, tmp_path)).html)
    share = 0.5 * (1 - 1 / len(NAMES))
    assert f"int8: rounding the inputs of packed layers causes 0% of the summed int4 error, {share:.0%} of" in text
    assert "int8 from inputs" in text
    by_name = {group.name: group for group in by_role(probed)}
    of_head = by_name["output_head"].inputs
    assert of_head is not None
    assert of_head.tolist() == [0.0, 0.0]
    others = by_name["conv"].inputs
    assert others is not None
    assert others.tolist() == pytest.approx([0.005, 0.5])
    assert "from inputs" not in text_of(made.html)


def test_what_an_encoder_adds_to_its_stream_goes_into_a_skip(whole: Probed) -> None:
    groups = {g.name: [list(NAMES)[i] for i in g.members] for g in by_path(whole)}
    assert groups["encoder, into a skip"] == ["conv_in", "down_blocks.0.resnets.0.conv2"]
    assert groups["encoder, inside"] == ["down_blocks.0.resnets.0.conv1"]


def test_the_middle_block_stands_between_encoder_and_decoder() -> None:
    layers = [layer(name, *place) for name, place in NAMES.items()]
    stages = [layers[i].stage for i in running_order(layers)]
    assert [stage for stage, _ in itertools.groupby(stages)] == ["ends", "encoder", "middle", "decoder", "ends"]


@pytest.mark.parametrize("count", [1, 8, 133, 800, 3000])
def test_names_in_the_heat_map_do_not_overlap(count: int) -> None:
    layers = [layer(f"down_blocks.{i // 40}.attentions.{i // 4}.to_q_{i}", "conv", "encoder") for i in range(count)]
    row = min(0.125, 24 / count)
    places = [at for at, _ in _labels(layers, row)]
    assert 1 <= len(places) <= 24 / 0.11
    assert all((b - a) * row > 0.11 for a, b in itertools.pairwise(places))


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 999])
def test_step_ticks_hold_the_ends_and_leave_room(steps: int) -> None:
    ticks = step_ticks(steps)
    assert (ticks[0], ticks[-1]) == (1, steps)
    assert len(ticks) <= 11
    assert sorted(set(ticks)) == ticks


# The page


class _Balanced(HTMLParser):
    """Checks that opened tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(html: str) -> _Balanced:
    page = _Balanced()
    page.feed(html)
    assert page.open == []
    return page


def test_the_page_stands_alone_and_holds_every_picture(made: Report) -> None:
    page = parsed(made.html)
    images = [attributes for tag, attributes in page.seen if tag == "img"]
    assert [p.name for p in made.pictures] == ["agreement", "heat-map", "roles", "shares", "steps", "skips"]
    assert len(images) == len(made.pictures)
    for image, picture in zip(images, made.pictures, strict=True):
        assert image["alt"] == picture.alt
        assert len(picture.alt) > 40
        assert base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,")) == picture.png
    assert {tag for tag, _ in page.seen} & {"link", "iframe", "object"} == set()
    assert [a for tag, a in page.seen if tag == "script"] == [{"type": "application/json"}, {}]
    assert "default-src 'none'" in made.html
    targets = [str(a.get("href") or a.get("src") or "") for _, a in page.seen]
    assert [t for t in targets if t and not t.startswith(("#", "data:"))] == []
    assert "url(" not in made.html
    anchors = {str(a["id"]) for _, a in page.seen if "id" in a}
    assert {t[1:] for t in targets if t.startswith("#")} == anchors


def test_the_page_says_what_was_probed_and_how_far_to_trust_it(made: Report) -> None:
    text = text_of(made.html)
    assert "8 layers, each quantized alone to INT4 and INT8" in text
    assert "660 denoiser forwards (80 reference, 560 probe, 20 re-measured), 2.4x below ablation's 1,600" in text
    assert "all FP16 66,536 (" in text
    assert "int4 8 1.000 0.80 100%" in text  # pairs, Spearman, predicted / measured, within a factor of two
    assert "policies 4 1.000 0.80 100%" in text  # the one without a picture is left out
    assert "predicted at 0 and measured at 0, as it must be. Measuring took 4,321" in text
    assert "int4, layers one by one 12%" in text
    assert "median of 4 random policies 50%" in text


def test_the_worst_layers_are_in_order(made: Report) -> None:
    text = text_of(made.html)
    rows = text[text.index("The 8 worst layers Largest") :]
    assert rows.index("conv_out output_head ends 64×64 8,192 1.00e-02 c 1.00e-06 c adjoint") < rows.index(
        "conv_in input"
    )


def test_the_same_table_makes_the_same_bytes(made: Report, kept: Path) -> None:
    again = make_report(kept)
    assert again.html == made.html
    assert [p.png for p in again.pictures] == [p.png for p in made.pictures]


@pytest.mark.parametrize(
    ("lost", "remedy"),
    [
        ("split.safetensors", "bitpolicy probe --split --output-dir"),
        ("check.json", "bitpolicy probe --check --output-dir"),
    ],
)
def test_a_section_without_its_input_names_the_command_that_creates_it(
    made: Report, folder: Path, lost: str, remedy: str
) -> None:
    assert remedy not in text_of(made.html)
    (folder / lost).unlink()
    less = make_report(folder)
    assert f"{remedy} {folder}" in text_of(less.html)
    parsed(less.html)
    assert (less.claims == ()) == (lost == "split.safetensors")


@pytest.mark.parametrize("found", ["run.json", "policy.yaml"])
def test_in_the_folder_of_a_search_the_remedy_names_another_folder(
    made: Report, folder: Path, command: Callable[..., Outcome], found: str
) -> None:
    """A probe would replace the table that the search was decided by."""
    (folder / "check.json").unlink()
    about = ModelReference(id="owner/model", component="unet", class_name="UNet2DConditionModel", sha256="0" * 64)
    if found == "policy.yaml":
        Policy(model=about).save(folder / found)
    else:
        (folder / found).write_text("{}")
    of = "--model owner/model " if found == "policy.yaml" else ""
    assert f"bitpolicy probe --check {of}--output-dir {folder}-probe" in text_of(make_report(folder).html)
    (folder / "sensitivity.safetensors").unlink()
    assert f"--output-dir {folder}-probe`" in command(folder).err


@pytest.mark.parametrize("probe", ["weight", "stepwise", "ablation"])
def test_a_probe_without_steps_or_images_draws_what_it_can(whole: Probed, tmp_path: Path, probe: str) -> None:
    changes = {} if probe == "stepwise" else {"sketches": None}
    found = replace(whole, split=None, check=None, table=replace(whole.table, probe=probe, cost=None, **changes))
    made = make_report(save(found, tmp_path / "x"))
    parsed(made.html)
    text = text_of(made.html)
    assert ("probe are not image errors" in text) == (made.lists is None) == (probe != "ablation")
    assert text.count("This folder has no errors by step") == 3
    assert "worst step" not in text
    assert "roles" in [p.name for p in made.pictures]


def one_format() -> Probed:
    error = errors()[:, :1]
    return replace(probed_of(errors()), table=table_of(error), split=split_of(error, (0.8, 0.2)))


def transformer() -> Probed:
    stages = ("early", "middle", "late")
    layers = [layer(f"transformer_blocks.{i}.attn.to_q", "attention_qkv", stages[i // 2]) for i in range(6)]
    error = torch.full((6, 2), 1e-4)
    found = replace(table_of(error), layers=tuple(one.name for one in layers))
    return Probed(found, model_of(layers), split_of(error, (0.3, 0.3)))


def large() -> Probed:
    names = [
        f"{side}_blocks.{i // 100}.attentions.{i // 10 % 10}.to_q_{i}" for side in ("down", "up") for i in range(400)
    ]
    stages = ["encoder"] * 400 + ["decoder"] * 400
    layers = [layer(name, "attention_qkv", stage) for name, stage in zip(names, stages, strict=True)]
    error = torch.logspace(-9, -3, 800)[:, None] * torch.tensor([[1.0, 0.01]])
    return Probed(replace(table_of(error), layers=tuple(names)), model_of(layers), split_of(error, (0.8, 0.2)))


def no_error() -> Probed:
    error = torch.zeros(len(NAMES), 2)
    return probed_of(error, split=split_of(error, (0.8, 0.2)))


@pytest.mark.parametrize("make", [one_format, transformer, large, no_error])
def test_other_denoisers(make: Callable[[], Probed], tmp_path: Path) -> None:
    made = make_report(save(make(), tmp_path / "x"))
    parsed(made.html)
    assert "heat-map" in [p.name for p in made.pictures]
    assert ("nothing to compare" in text_of(made.html)) == (make in (transformer, no_error))


def test_the_heat_map_of_a_large_model_is_no_taller_than_a_few_screens() -> None:
    found = large()
    assert found.split is not None
    image = Image.open(io.BytesIO(heat_map(found, found.split).png))
    assert image.height < 3100
    assert image.width < 1400


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    found = transformer()
    name = "a<script>.0.b&c"
    layers = [replace(found.layers[0], name=name), *found.layers[1:]]
    found = Probed(replace(found.table, layers=tuple(one.name for one in layers)), model_of(layers))
    page = parsed(make_report(save(found, tmp_path / "x")).html)
    assert [tag for tag, _ in page.seen].count("script") == 2  # the page's own


def test_text_between_backticks_is_code_and_numbers_are_right_aligned() -> None:
    assert paragraph("run `a < b` now") == "<p>run <code>a &lt; b</code> now</p>"
    assert table(["x", "y"], [("a", "1e-3"), ("b", "")]).count('class="n"') == 3


# Files and mistakes


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`command(FOLDER, ...)` runs `bitpolicy report`."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(report)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        code = main._run(app, "bitpolicy")
        return Outcome(code, *capsys.readouterr())

    return run


def test_the_command_writes_a_page_beside_the_table(command: Callable[..., Outcome], folder: Path) -> None:
    outcome = command(folder)
    assert (outcome.code, outcome.err) == (0, "")
    assert "INT4 is a bias: confirmed" in outcome.out
    assert f"{folder / 'report.html'} has the report" in outcome.out
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["check.json", "report.html", "sensitivity.csv", "sensitivity.safetensors", "split.safetensors"]
    )


def test_the_command_writes_pictures_and_prints_json(command: Callable[..., Outcome], folder: Path) -> None:
    out = folder.parent / "out"
    (out / "pictures").mkdir(parents=True)
    (out / "pictures" / "mine.txt").write_text("kept")
    outcome = command(folder, "--budget", "40%", "--output", out / "a.html", "--pictures", out / "pictures", "--json")
    (line,) = outcome.out.splitlines()
    result = json.loads(line)
    assert result["never"] == ["conv_out"]
    assert result["claims"] == {"INT4 is a bias": True, "INT8 is a noise": True}
    assert result["budget_bytes"] == int(0.4 * 66536)
    assert [Image.open(path).format for path in result["pictures"]] == ["PNG"] * 6
    assert (out / "pictures" / "mine.txt").read_text() == "kept"
    assert len(list((out / "pictures").iterdir())) == 8
    rows = list(csv.DictReader((out / "pictures" / "layers.csv").open()))
    assert [row["layer"] for row in rows if row["int4"] == "free"] == [n for n in NAMES if n in result["free"]]
    assert {row["layer"] for row in rows if row["int4"] == "never"} == set(result["never"])
    parsed((out / "a.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("where", ["nothing", "empty"])
def test_a_folder_without_a_table_is_refused_with_the_remedy(
    command: Callable[..., Outcome], tmp_path: Path, where: str
) -> None:
    (tmp_path / "empty").mkdir()
    outcome = command(tmp_path / where)
    assert (outcome.code, outcome.out) == (2, "")
    assert "holds no sensitivity.safetensors; `bitpolicy probe --split --check --output-dir" in outcome.err
    assert not (tmp_path / where / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--output", "."), "is a folder"),
        (("--pictures", "sensitivity.csv"), "is a file"),
        (("--budget", "5 apples"), "is not a size"),
        (("--budget", "1%"), "below the smallest policy"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(
    command: Callable[..., Outcome],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, str],
    said: str,
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(p.name for p in folder.iterdir())
    outcome = command(folder, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize("name", ["split.safetensors", "check.json"])
def test_files_of_two_probes_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    other = save(replace(transformer(), check=check_of(transformer().table)), tmp_path / "other")
    (folder / name).write_bytes((other / name).read_bytes())
    with pytest.raises(
        BitPolicyError,
        match=r"another probe than sensitivity\.safetensors .*run `bitpolicy probe --(split|check)` again",
    ):
        make_report(folder)


@pytest.mark.parametrize("name", ["sensitivity.safetensors", "split.safetensors", "check.json"])
def test_a_damaged_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(BitPolicyError, match=re.escape(name)):
        make_report(folder)


@pytest.mark.parametrize("name", ["sensitivity.safetensors", "split.safetensors", "check.json"])
def test_a_file_with_another_number_is_refused(folder: Path, name: str) -> None:
    """The file still parses."""
    content = bytearray((folder / name).read_bytes())
    at = content.index(b'"forwards": ') + 12 if name == "check.json" else len(content) - 1
    content[at] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(
        BitPolicyError, match=rf"cannot read .*{re.escape(name)}: its checksum .*; run `bitpolicy probe"
    ):
        make_report(folder)


@pytest.mark.parametrize("name", ["sensitivity.safetensors", "split.safetensors", "check.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BitPolicyError, match=rf"holds no sensitivity|cannot read .*{re.escape(name)}: .*file"):
        make_report(folder)
