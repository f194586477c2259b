"""`frontier/`: the curve of error against bytes, as policies, a table and a picture, from one probe."""

from __future__ import annotations

import csv
import io
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.storage.atomic import write_text, written_aside
from bitpolicy.report.drawing import picture
from bitpolicy.search.knapsack import Solution
from bitpolicy.search.problem import Problem

_PLENTY = 10  # corners for each point, so that a corner is close to every budget


@dataclass(frozen=True)
class Point:
    """One policy of the curve.

    Attributes:
        choices: layer name -> choice.
        nbytes: tensor bytes of the denoiser's checkpoint.
        error: predicted relative error of the final latents; None if the probe predicts none.
        psnr_db: measured on the search samples; None if no images were drawn.
    """

    choices: Mapping[str, Choice]
    nbytes: int
    error: float | None
    psnr_db: float | None = None


def points(problem: Problem, account: ByteAccount, count: int) -> list[Point]:
    """`count` policies with budgets spread evenly from the smallest policy to FP16, without repeats.

    Args:
        account: byte account of the checkpoint.
    """
    return _points(problem, account, problem.frontier(_budgets(problem, count)))


def quick_points(problem: Problem, account: ByteAccount, count: int) -> list[Point]:
    """The same at once, if the frontier has plenty of corners: for each budget, the largest corner within it, which is
    exact for its own bytes. With few corners, the problem is small, and each budget is solved for."""
    corners = problem.corners()
    if len(corners) < _PLENTY * count:
        return points(problem, account, count)
    sizes = [problem.account.fixed + corner.nbytes for corner in corners]
    return _points(problem, account, [corners[bisect_right(sizes, b) - 1] for b in _budgets(problem, count)])


def _budgets(problem: Problem, count: int) -> list[int]:
    return np.linspace(problem.smallest, problem.account.reference, count).astype(np.int64).tolist()


def _points(problem: Problem, account: ByteAccount, solutions: Sequence[Solution]) -> list[Point]:
    found: dict[int, Point] = {}
    for solution in solutions:
        choices = problem.choices(solution)
        formats = {name: choice.format for name, choice in choices.items()}
        nbytes = account.total(formats)
        found.setdefault(nbytes, Point(choices, nbytes, problem.table.additive_error(list(formats.values()))))
    return [found[nbytes] for nbytes in sorted(found)]


def file_name(point: Point, account: ByteAccount) -> str:
    """Name of the policy file, from the policy's share of the FP16 bytes."""
    return f"policy-{point.nbytes / account.reference:05.1%}.yaml".replace("%", "")


def save_table(path: Path, curve: Sequence[Point], account: ByteAccount) -> None:
    """Write one row per policy."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    names = list(dict.fromkeys(c.format.name for point in curve for c in point.choices.values()))
    rows.writerow(["policy", "bytes", "share_of_fp16", "bits_a_parameter", "predicted_error", "psnr_db", *names])
    for point in curve:
        counts = [sum(c.format.name == name for c in point.choices.values()) for name in names]
        measured = "" if point.psnr_db is None else f"{point.psnr_db:.3f}"
        predicted = "" if point.error is None else f"{point.error:.6g}"
        share, bits = point.nbytes / account.reference, 8 * point.nbytes / account.parameters
        rows.writerow(
            [file_name(point, account), point.nbytes, f"{share:.4f}", f"{bits:.3f}", predicted, measured, *counts]
        )
    write_text(path, text.getvalue())


def save_picture(path: Path, curve: Sequence[Point], account: ByteAccount) -> None:
    """Plot measured PSNR against bytes if there is any, otherwise the predicted error."""
    measured = any(point.psnr_db is not None for point in curve)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = [point.psnr_db if measured else point.error for point in curve]
        known = [(point.nbytes / 1e6, value) for point, value in zip(curve, values, strict=True) if value]
        if known:
            axes.plot(*zip(*known, strict=True), "o-", color="#0072B2")
            axes.set_yscale("linear" if measured else "log")
        else:
            why = "the probe predicts no image error,\nand with 0 trials no images were drawn"
            axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
        axes.set_ylabel("PSNR against FP16, dB" if measured else "predicted relative error of the latent")
        axes.set_xlabel(f"denoiser, MB (FP16: {account.reference / 1e6:.4g} MB)")
        axes.set_title("The best policy at every size, from one probe")
        axes.grid(visible=True)
        figure.tight_layout()

    drawn = picture("frontier", "quality of the best policy at every size", draw, 7.0, 3.8)
    with written_aside(path) as aside:
        aside.write_bytes(drawn.png)
