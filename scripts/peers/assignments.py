"""Other ways to choose among our formats. Rounding, bias correction and packing are ours; only the assignment differs.

uniform       one format for all layers
by hand       a careful manual policy
random        a random feasible policy
weight        exact knapsack on relative weight error
one-step ablation   quantize one layer, call the denoiser once at a few timesteps of the reference's trajectory,
                    compare its output; exact knapsack on the noise-to-signal power (MixDQ, Zhao et al. 2024)
modelopt            the bit widths that its auto_quantize chose, in our formats
one-step gradient   exact knapsack on the adjoint of single steps; the difference to ours is what the trajectory adds
PSNR threshold      each layer gets the smallest format that alone keeps the PSNR above a threshold, the highest one
                    that fits (Apple's ml-stable-diffusion recipes; `peers.psnr_threshold`)
whole ablation      quantize one layer, sample, compare the final latent; exact knapsack on its squared error
adjoint additive    exact knapsack on the whole trajectory's adjoint: ours without the quadratic form and the search
adjoint quadratic   the same, then repaired for the way errors add up (`peers.interactions`)
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch

from benchmark_policies import by_hand
from peers.entry import SHARES, Entry
from peers.interactions import quadratic
from peers.one_step import one_step_table
from peers.psnr_threshold import LARGE, final_psnr, one_step_psnr, thresholded
from peers.rivals import Rivals

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.workflow.plan import Plan

RANDOM = 4  # policies at each size


def all_entries(rivals: Rivals, only: str = "*") -> Iterator[Entry]:
    """Every assignment at every budget, cheap ones first, of the families that match the pattern `only`."""
    makers: dict[str, Callable[[], Iterable[Entry]]] = {
        "uniform": lambda: _uniform(rivals),
        "by hand": lambda: _by_hand(rivals),
        "random": lambda: _random(rivals),
        "modelopt assignment": lambda: _handed_over(rivals),
        "weight knapsack": lambda: _exact(rivals, "weight knapsack", rivals.probed("weight")),
        "one-step gradient": lambda: _exact(rivals, "one-step gradient", rivals.probed("stepwise")),
        "adjoint additive": lambda: _exact(rivals, "adjoint additive", rivals.ours, "ours"),
        "adjoint quadratic": lambda: quadratic(rivals),
        "one-step ablation": lambda: _exact(rivals, "one-step ablation", _one_step(rivals)),
        "whole ablation": lambda: _exact(rivals, "whole ablation", rivals.ablated()),
        "PSNR threshold": lambda: _thresholded(rivals),
    }
    for family, make in makers.items():
        if fnmatch(family, only):
            yield from make()


def _uniform(rivals: Rivals) -> Iterator[Entry]:
    for format in rivals.plan.formats[:-1]:
        yield rivals.write(f"uniform {format.name}", dict.fromkeys(rivals.names, format), None)


def _by_hand(rivals: Rivals) -> Iterator[Entry]:
    for share in SHARES:
        choices = by_hand(rivals.plan, int(share * rivals.plan.account.reference))
        yield rivals.write("by hand", {name: choice.format for name, choice in choices.items()}, share)


def _random(rivals: Rivals) -> Iterator[Entry]:
    for share, seed in itertools.product(SHARES, range(RANDOM)):
        yield rivals.write(f"random #{seed}", random_formats(rivals.plan, share, seed), share)


def _handed_over(rivals: Rivals) -> Iterator[Entry]:
    """modelopt's bit widths, in our formats."""
    for path in sorted((rivals.work / "modelopt").glob("assignment@*.json")):
        share, _, setting = path.stem.removeprefix("assignment@").partition("-")
        bits = json.loads(path.read_text())["layers"]
        widths = {4: format_named("int4"), 8: format_named("int8"), 16: FP16}
        formats = {name: widths[bits[name]] for name in rivals.names}
        if rivals.plan.account.total(formats) <= float(share) * rivals.plan.account.reference:
            yield rivals.write(f"modelopt assignment #{setting}", formats, float(share))


def _one_step(rivals: Rivals) -> SensitivityTable:
    return one_step_table(rivals.plan, rivals.work, rivals.calibration)


def _thresholded(rivals: Rivals) -> Iterator[Entry]:
    plan = rivals.plan
    once = one_step_psnr(plan, rivals.work, rivals.calibration, rivals.ours)
    settings = {
        "one-step": (once, 0),
        "one-step-large": (once, LARGE),
        "whole": (final_psnr(plan, rivals.ablated()), 0),
    }
    for share, (setting, (psnr, least)) in itertools.product(SHARES, settings.items()):
        formats = thresholded(plan, psnr, share, least)
        if formats is not None:
            yield rivals.write(f"PSNR threshold #{setting}", formats, share)


def _exact(rivals: Rivals, family: str, table: SensitivityTable, kind: str = "assignment") -> Iterator[Entry]:
    plan = rivals.plan
    for share in SHARES:
        problem = Problem(
            plan.layers, plan.formats, plan.account, table=table, budget=int(share * plan.account.reference)
        )
        chosen = problem.choices(problem.solve())
        yield rivals.write(family, {name: choice.format for name, choice in chosen.items()}, share, kind)


def random_formats(plan: Plan, share: float, seed: int) -> dict[str, Format]:
    """A feasible policy with no room left: narrowed layer by layer at random, then widened at random."""
    stream, budget = random.Random(seed), int(share * plan.account.reference)
    formats = {layer.name: stream.choice(plan.formats) for layer in plan.layers}
    ranked = sorted(plan.formats, key=lambda format: format.nbytes((64, 64), plan.source.storage))
    names = list(formats)
    while plan.account.total(formats) > budget:
        name = stream.choice(names)
        formats[name] = ranked[max(0, ranked.index(formats[name]) - 1)]
    for wider in ranked[1:]:
        for name in stream.sample(names, len(names)):
            if ranked.index(wider) == ranked.index(formats[name]) + 1:
                trial = {**formats, name: wider}
                formats = trial if plan.account.total(trial) <= budget else formats
    return formats
