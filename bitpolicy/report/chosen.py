"""The report's section on a search: the policy, its images next to the reference's, and the trials that led to it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bitpolicy.output_folder import read_result
from bitpolicy.policies.policy import Policy
from bitpolicy.report.drawing import FAINT, FORMAT_COLORS, Picture, picture
from bitpolicy.report.inputs import Probed
from bitpolicy.report.page import Section, figure, folded, heading, paragraph, table
from bitpolicy.report.policy_map import policy_map
from bitpolicy.search.study.trials import FILE as TRIALS
from bitpolicy.search.study.trials import TrialRow, load_trials
from bitpolicy.workflow.decision import in_words, why_stopped

_COMPARISON, _CURVE = "compare.png", "frontier/frontier.png"


def chosen(probed: Probed, policy: Policy, folder: Path) -> Section:
    """The section on the search in `folder`: what it chose, and how good the images are.

    Raises:
        BitPolicyError: a file of the search is damaged, or the policy is for other layers than the table.
    """
    choices = policy.resolve(layer.name for layer in probed.layers)
    formats = {name: choice.format for name, choice in choices.items()}
    counts = Counter(format.name for format in formats.values())
    mapped = policy_map(probed, formats)
    body = [table(["", ""], _facts(policy, counts, _result(folder)))]
    pictures: list[Picture] = []

    def show(drawn: Picture, caption: str) -> None:
        pictures.append(drawn)
        body.append(figure(drawn, caption))

    if (folder / _COMPARISON).is_file():
        alt = (
            "Held-out images: the reference's above, the checkpoint's below, then those of one format in every layer, "
            "with the PSNR of each."
        )
        caption = (
            "The same prompts and seeds; neither the probe nor the search used them. Top: the reference. Middle: the "
            "policy. Bottom: the best single format for every layer in at most the policy's bytes, with the same "
            "rounding method and bias correction."
        )
        show(Picture("compare", (folder / _COMPARISON).read_bytes(), alt), caption)
    body.append(heading("The format of every layer"))
    show(
        mapped,
        "One strip per layer, coloured by bit width, in the cell of its block and role. Blocks are in the order in "
        "which the sample passes them. Right: bytes of the block's weights under the policy, and at FP16.",
    )
    body += [heading("The trials"), paragraph(_choice_sentence(policy))]
    if (folder / TRIALS).is_file():
        rows = load_trials(folder / TRIALS)
        show(
            _trials(rows, policy),
            "PSNR of each trial's images over the search samples that it used. Filled: scored on all of them; hollow: "
            "stopped early because it was losing. Line: the best so far.",
        )
        body.append(folded("The numbers", table(_columns(policy), [_row(row) for row in rows])))
    if (folder / _CURVE).is_file():
        body.append(heading("The curve"))
        alt = "Quality of the best policy at every size."
        show(Picture("frontier", (folder / _CURVE).read_bytes(), alt), f"{alt} frontier.csv has the numbers.")
    return Section("chosen", "What the search chose", "\n".join(body), tuple(pictures))


def _result(folder: Path) -> Mapping[str, Any]:
    """The content of result.json; empty until the search has finished."""
    return read_result(folder) or {}


def _facts(policy: Policy, counts: Mapping[str, int], result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The request, the size, and the measured quality."""
    about, budget = policy.result, policy.budget
    rows = [] if budget is None else [("asked", f"{budget.asked} (scope {budget.scope})")]
    rows.append(("layers", ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))))
    if about is not None:
        rows.append(("bytes", f"{about.policy_bytes:,}"))
        rows += [] if about.predicted_error is None else [("predicted error", f"{about.predicted_error:.3g}")]
    rows.append(("held-out PSNR", _psnr(policy, result)))
    for name, found in (result.get("quality") or {}).items():
        mean = found.get("mean", found.get("to_reference"))
        rows.append((name, "identical" if mean is None else f"{mean:.6g} {found.get('unit', '')}".rstrip()))
    return rows


def _psnr(policy: Policy, result: Mapping[str, Any]) -> str:
    found = result.get("psnr_db")
    if found is None:
        known = policy.result and policy.result.psnr_db
        return f"mean {known:.2f} dB" if known else "not measured; the search has not finished"
    if found["mean"] is None:
        return f"all {found['n']} images are identical"
    return f"mean {found['mean']:.2f} dB, worst {found['min']:.2f} dB over {found['n']} images"


def _choice_sentence(policy: Policy) -> str:
    """How the policy was chosen."""
    about = policy.provenance.get("search")
    if not about:
        return "The policy does not say how it was chosen."
    words = in_words(about)
    if not isinstance(about, str) and "target" in about:
        return f"Chosen: {words}. No study ran: {about['policies_measured']} policies of other sizes were measured."
    if isinstance(about, str) or not about.get("trials"):
        return f"Chosen: {words}. No study ran."
    study = why_stopped(about)
    return f"Chosen: {words}." if study is None else f"Chosen: {words}. The study: {study}."


def _trials(rows: Sequence[TrialRow], policy: Policy) -> Picture:
    about = policy.provenance.get("search")
    won = str(about.get("won", "")) if isinstance(about, Mapping) else ""
    shown = [row for row in rows if row.psnr_db is not None]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for whole, fill in ((True, FORMAT_COLORS[1]), (False, "white")):
            of_kind = [(row.number, row.psnr_db or 0.0) for row in shown if row.stopped != whole]
            if of_kind:
                label = "scored on all samples" if whole else "stopped early"
                numbers, values = zip(*of_kind, strict=True)
                axes.plot(numbers, values, "o", ls="none", mec=FORMAT_COLORS[1], mfc=fill, ms=5, label=label)
        _draw_best(axes, [row for row in shown if not row.stopped])
        for row in shown:
            name = row.start or f"trial {row.number}"
            if row.start or name == won:
                text = f"{name}{', chosen' if name == won else ''}"
                axes.annotate(text, (row.number, row.psnr_db or 0.0), (4, 5), textcoords="offset points", fontsize=7.5)
        axes.set(xlabel="trial", ylabel="PSNR over the search samples, dB")
        axes.margins(x=0.08, y=0.15)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        if shown:
            axes.legend(loc="lower right")
        figure.tight_layout()

    best = max((row.psnr_db for row in shown if row.psnr_db is not None and not row.stopped), default=None)
    alt = f"PSNR of {len(rows)} trials" + ("." if best is None else f"; the best has {best:.1f} dB.")
    return picture("trials", alt, draw, 7.0, 3.4)


def _draw_best(axes: Axes, whole: Sequence[TrialRow]) -> None:
    """Draw the best result so far, by the study's objective, as a staircase."""
    numbers: list[int] = []
    best: list[float] = []
    lowest = math.inf
    for row in whole:
        numbers.append(row.number)
        best.append(row.psnr_db or 0.0 if row.score < lowest else best[-1])
        lowest = min(lowest, row.score)
    if numbers:
        axes.step(numbers, best, where="post", color=FAINT, lw=1.0, zorder=0, label="best so far")


def _columns(policy: Policy) -> tuple[str, ...]:
    about = policy.provenance.get("search")
    objective = about.get("objective", "mse") if isinstance(about, Mapping) else "mse"
    score = {"mse": "mean squared error", "ssim": "1 - SSIM"}.get(objective, objective)
    return ("trial", "what", score, "PSNR, dB", "samples")


def _row(row: TrialRow) -> tuple[str, ...]:
    what = row.start or ("" if row.repeats is None else f"the policy of trial {row.repeats}")
    psnr = "identical" if row.psnr_db is None else f"{row.psnr_db:.2f}"
    return (str(row.number), what, f"{row.score:.4g}", psnr, f"{row.samples}{', stopped' if row.stopped else ''}")
