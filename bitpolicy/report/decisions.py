"""The report's last sections: the layers that a policy should spare, and the worst layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from bitpolicy.report.inputs import Probed
from bitpolicy.report.lists import DEFAULT_BUDGET, FREE_DB, NEVER_DB, Lists, Marked
from bitpolicy.report.page import Section, folded, heading, missing, paragraph, table
from bitpolicy.report.steps import largest_step

_SHOWN = 25  # rows of a list that are visible; the rest is folded
_WORST = 20


def decisions(probed: Probed, lists: Lists | None, folder: Path) -> Section:
    """Which layers are never INT4, which are free at INT4, and how hand-written lists compare."""
    small = probed.formats[0].name.upper()
    title = f"Never {small}, free at {small}"
    if lists is None:
        command = probed.command("--probe adjoint", folder)
        return Section(
            "lists", title, missing(f"The scores of the {probed.table.probe} probe are not image errors.", command)
        )
    if lists.error <= 0:
        return Section("lists", title, paragraph(f"{_solution(lists)} The error is zero: there is nothing to compare."))
    never, free = lists.never, lists.free
    body = [
        paragraph(_solution(lists)),
        heading(f"Never {small}: {len(never)} of {len(lists.layers)} layers"),
        paragraph(
            f"Any one of these layers, stored in {small} instead of the solver's choice and with nothing else changed, "
            f"would lower the PSNR of the final latent by more than {NEVER_DB:g} dB. The list is for this budget: the "
            "smaller the allowed error, the longer the list."
        ),
        _rows(never, small, own=False),
        heading(f"Free at {small}: {len(free)} layers"),
        paragraph(
            f"In each of these layers, {small} costs less than {FREE_DB:g} dB compared with FP16, if the other layers "
            "are as the solver chose. Largest first."
        ),
        _rows(free, small, own=True),
        heading("Hand-written lists"),
        *_by_hand(lists, small),
    ]
    return Section("lists", title, "\n".join(body))


def _solution(lists: Lists) -> str:
    counts = ", ".join(f"{count} {name.upper()}" for name, count in lists.counts.items() if count)
    asked = f"{lists.budget.asked}{' of FP16' if lists.budget.asked.endswith('%') else ''}"
    why = f" (the default: {DEFAULT_BUDGET}, or the budget of the folder's policy; `--budget` sets another)"
    error = f"{lists.error:.3g}, {-10 * math.log10(lists.error):.1f} dB below the latent" if lists.error > 0 else "0"
    return (
        f"Budget: {asked}{why if lists.default else ''}, {lists.budget}. The exact solver uses {lists.nbytes:,} bytes: "
        f"{counts} layers, with an additive error of {error}."
    )


def _rows(marked: Sequence[Marked], small: str, own: bool) -> str:
    if not marked:
        return paragraph("None.")
    columns = ["layer", "role", "stage", "bytes at FP16", "chosen", f"dB at {small}"]
    rows = [
        [m.layer.name, m.layer.role, m.layer.stage, f"{m.nbytes:,}", m.chosen.name, _db(m.own if own else m.cost, own)]
        for m in marked
    ]
    shown = table(columns, rows[:_SHOWN])
    return (
        shown
        if len(rows) <= _SHOWN
        else f"{shown}\n{folded(f'{len(rows) - _SHOWN} more', table(columns, rows[_SHOWN:]))}"
    )


def _db(value: float, fine: bool = False) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.4f}" if fine else f"{value:.2f}"


def _by_hand(lists: Lists, small: str) -> list[str]:
    named = lists.by_hand
    if not named:
        return [paragraph("This denoiser has no separate time embedding, first layer or last layer.")]
    right = sum(m.never for m in named)
    unnamed = sum(not m.by_hand for m in lists.never)
    text = (
        f"The usual list spares the time embedding and the first and last layers: {len(named)} layers here. At this "
        f"budget, {right} of them are never {small}, and {sum(m.free for m in named)} are free. The list misses "
        f"{unnamed} of the {len(lists.never)} layers that are never {small}."
    )
    if lists.pinned_db is None:
        cost = "Keeping that list at FP16 does not fit this budget."
    else:
        cost = (
            "Keeping the whole list at FP16 and solving for the rest within the same bytes costs "
            f"{max(0.0, lists.pinned_db):.2f} dB compared with the exact solution."
        )
    columns = ["layer", "role", "bytes at FP16", "chosen", f"dB at {small}", f"{small}?"]
    rows = [[m.layer.name, m.layer.role, f"{m.nbytes:,}", m.chosen.name, _db(m.cost), m.verdict] for m in named]
    return [paragraph(f"{text} {cost}"), table(columns, rows)]


def worst(probed: Probed) -> Section:
    """The layers with the largest error in the smallest format."""
    small = probed.formats[0]
    error = probed.table.error[:, probed.column(small)]
    order = error.argsort(descending=True, stable=True)[:_WORST].tolist()
    columns = ["layer", "role", "stage", "shape", "bytes at FP16", *(f.name for f in probed.formats), "source"]
    columns += [] if probed.split is None else ["worst step"]
    rows = [_worst_row(probed, place) for place in order]
    what = (
        f"Largest error in {small.name} first: relative power of the {probed.measure}'s error with only this layer "
        "quantized and the better of its two biases (c: the corrected one). Source: the probe, or a measurement where "
        "first order is not accurate enough."
    )
    what += "" if probed.split is None else " Worst step: the step at which most of the error enters."
    return Section("worst", f"The {len(rows)} worst layers", f"{paragraph(what)}\n{table(columns, rows)}")


def _worst_row(probed: Probed, place: int) -> list[str]:
    layer, found = probed.layers[place], probed.table
    row = [layer.name, layer.role, layer.stage, "×".join(map(str, layer.shape)), f"{probed.layer_bytes(place):,}"]
    for format in probed.formats:
        column = probed.column(format)
        mark = " c" if layer.has_bias and bool(found.corrected[place, column]) else ""
        row.append(f"{float(found.error[place, column]):.2e}{mark}")
    row.append(found.source(place, probed.column(probed.formats[0])))
    if probed.split is None:
        return row
    step = largest_step(probed, probed.split, place, probed.column(probed.formats[0]))
    return [*row, str(step) if step else "outside the loop"]
