"""What the search costs without a model: the exact solver, the frontier, the quadratic form and its repair.

Problems are random and of realistic size: layers as wide as SDXL's, errors that fall by a factor of 4 per bit, layers
of widely different sensitivity, and sketches in which a tenth of the power is common to all layers. Each row gives the
median and the range over several seeds. Times are processor seconds; on one thread these equal the wall time of
an idle machine. Prints one table and writes JSON.

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python scripts/bench_search.py
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bitpolicy.search.frontier import frontier, points, smallest
from bitpolicy.search.knapsack import Solution, solve
from bitpolicy.search.quadratic import QuadraticForm, feasible, repair

WIDTHS = (320 * 320, 640 * 640, 1280 * 1280, 1280 * 5120, 320 * 36, 640 * 640 * 9, 1280 * 1280 * 9, 2048 * 640)
EIGHT = (2.25, 3.25, 4.25, 4.5, 5.25, 6.25, 8.0, 16.0)  # bits per weight; the last is FP16
THREE = (4.5, 8.0, 16.0)
SHARES = (0.25, 0.35, 0.5, 0.7)
COMMON = 0.1

Measured = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=800)
    parser.add_argument("--sketches", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("build/bench_search.json"))
    args = parser.parse_args()
    found: Measured = {}
    for seed in range(args.seeds):
        for name, values in {**exact(args.layers, seed), **interactions(args.layers, args.sketches, seed)}.items():
            found.setdefault(name, []).extend(values)
    print(f"{args.layers} layers, {args.sketches} sketches, {args.seeds} seeds, {threads()} threads")
    print(table(found))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(
        json.dumps({**vars(args), "json": None, "threads": threads(), "found": found}, indent=2) + "\n"
    )


def exact(layers: int, seed: int) -> Measured:
    """The knapsack with eight formats."""
    error, nbytes = problem(layers, EIGHT, seed)
    budgets = np.linspace(nbytes[:, 0].sum(), nbytes[:, -1].sum(), 50).astype(int).tolist()
    solved = [timed(solve, error, nbytes, int(nbytes[:, -1].sum() * share)) for share in SHARES]
    curve, seconds = timed(frontier, error, nbytes, budgets)
    back = [timed(smallest, error, nbytes, solution.error) for solution, _ in solved]
    return {
        "solve, 8 formats: s": [s for _, s in solved],
        "solve, 8 formats: gap": [solution.gap for solution, _ in solved],
        "frontier of 50, 8 formats: s": [seconds],
        "frontier of 50, 8 formats: worst gap": [max(solution.gap for solution in curve)],
        "points of the hull, 8 formats: s": [timed(points, error, nbytes)[1]],
        "smallest for an error, 8 formats: s": [s for _, s in back],
        "smallest for an error, 8 formats: gap": [solution.gap for solution, _ in back],
    }


def interactions(layers: int, sketches: int, seed: int) -> Measured:
    """The quadratic form with INT4, INT8 and FP16."""
    error, nbytes = problem(layers, THREE, seed)
    s = sketched(error, sketches, seed)
    error = np.square(s).mean(axis=0)
    budget = int(nbytes[:, -1].sum() * 0.4)
    policies, drawing = timed(feasible, error, nbytes, budget)
    form, fitting = timed(QuadraticForm.of, s, error, np.arange(sketches) // 2, policies)
    start = solve(error, nbytes, budget)
    repaired, seconds = timed(repair, form, nbytes, budget, start)
    return {
        "form: s": [drawing + fitting],
        "form: shrinkage": [form.shrinkage],
        "whole policies: 1/s": [whole_rate(form, layers, seed)],
        "exchanges of two layers: 1/s": [exchange_rate(form, nbytes, repaired)],
        "repair: s": [seconds],
        "repair: E after / before": [repaired.error / float(form.value(start.formats[None])[0])],
    }


def whole_rate(form: QuadraticForm, layers: int, seed: int, count: int = 8192) -> float:
    drawn = np.random.default_rng(seed).integers(0, form.error.shape[1], size=(count, layers))
    return count / timed(form.value, drawn)[1]


def exchange_rate(form: QuadraticForm, nbytes: np.ndarray, optimum: Solution) -> float:
    """Exchanges per second. Repairing a repaired solution tries every pair of columns once and changes nothing."""
    pairs = int(np.isfinite(form.error).sum()) ** 2
    return pairs / timed(repair, form, nbytes, optimum.nbytes, optimum)[1]


def problem(layers: int, bits: tuple[float, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors and bytes, shape (layers, formats)."""
    draw, width = np.random.default_rng(seed), np.array(bits)
    nbytes = np.round(draw.choice(WIDTHS, size=(layers, 1)) * width / 8).astype(np.int64)
    error = draw.lognormal(-8, 2, size=(layers, 1)) * 4.0 ** (4 - width)
    error = error * draw.lognormal(0, 0.5, size=(layers, len(bits)))
    error[:, -1] = 0.0
    return error, nbytes


def sketched(error: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sketches whose mean square is about `error`, shape (count, layers, formats)."""
    draw = np.random.default_rng(seed)
    shared, own = draw.standard_normal((count, 1, 1)), draw.standard_normal((count, *error.shape))
    return (COMMON**0.5 * shared + (1 - COMMON) ** 0.5 * own) * np.sqrt(error)


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.process_time()
    result = work(*arguments)
    return result, time.process_time() - start


def threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", "all")


def table(found: Measured) -> str:
    """Median, minimum and maximum of each row."""
    lines = [f"{'':40}{'median':>12}{'least':>12}{'most':>12}"]
    for name, values in found.items():
        lines.append(f"{name:40}" + "".join(f"{v:12.4g}" for v in (np.median(values), min(values), max(values))))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
