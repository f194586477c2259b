"""Other ways to choose, under our formats, quantizer, bias correction and packing: only the assignment differs.
Quantizer and bias correction of a layer in a format are those that scored better in our own probe, for all alike.

    uniform       one format for all layers
    by hand       what a careful person writes
    random        any feasible policy
    weight        exact knapsack on relative weight error
    one-step ablation   quantize one layer, call the denoiser once at a few timesteps of the reference's trajectory,
                        compare its output; exact knapsack on the noise-to-signal power (MixDQ, Zhao et al. 2024)
    modelopt            the widths its auto_quantize chose, in our formats
    one-step gradient   exact knapsack on the adjoint of single steps: what the whole trajectory adds is what this lacks
    PSNR threshold      each layer gets the smallest format that, alone, keeps the final latent above a threshold; the
                        threshold is the highest that fits (Apple's ml-stable-diffusion recipes)
    whole ablation      exact knapsack on the same measurements
    adjoint, additive   exact knapsack on the whole trajectory's adjoint: ours without the quadratic form and the search
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from benchmark_policies import by_hand
from peers.entry import ACCOUNTED, SHARES, Entry, write_entry
from peers.one_step import one_step_table

from bitpolicy.kernels.format import Format
from bitpolicy.kernels.formats import FP16, format_named
from bitpolicy.plan import Plan
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.calibration import Calibration
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.progress import Stages
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.settings import Settings

RANDOM, ABLATED = 8, 4  # feasible policies at each size; samples that each layer is quantized on


@dataclass(frozen=True)
class Rivals:
    """What all assignments share.

    Attributes:
        plan: of the bundled pipeline.
        work: probe records go to `probes/`, entries to `candidates/`.
        calibration: E[x] of the reference, for corrected biases.
        ours: our own probe's table: it says which bias, and which quantizer, a layer gets with a format.
    """

    plan: Plan
    work: Path
    calibration: Calibration
    ours: SensitivityTable

    @property
    def names(self) -> list[str]:
        """The layers."""
        return [layer.name for layer in self.plan.layers]

    def write(self, family: str, formats: Mapping[str, Format], share: float | None, kind: str = "assignment") -> Entry:
        """One policy as an entry; what follows # in `family` tells settings of one family apart."""
        plan, nbytes = self.plan, self.plan.account.total(formats)
        name = family.replace(" ", "-").replace("#", "") + (f"@{share:.2f}" if share else "")
        row = family.partition(" #")[0]
        settings = {format.name: list(formats.values()).count(format) for format in plan.formats}
        entry = Entry(name, row, kind, nbytes, ACCOUNTED, row, share, settings)
        choices = {layer.name: self.ours.choice(i, formats[layer.name]) for i, layer in enumerate(plan.layers)}
        with quantized(plan.source.denoiser, choices, self.calibration, plan.source.storage):
            write_entry(self.work / "candidates", entry, plan.source.denoiser.state_dict())
        return entry

    def probed(self, probe: str, samples: int = 16) -> SensitivityTable:
        settings = Settings(budget="100%", quantizer="rtn", probe=probe, calibration_samples=samples)
        run = self.plan.probe(settings, self.work / "probes" / f"{probe}-{samples}", Stages())
        return run.table(run.reference())


def all_entries(rivals: Rivals, only: str = "*") -> Iterator[Entry]:
    """Every assignment at every budget, the cheap ones first; of those families alone that the glob `only` matches."""
    makers: dict[str, Callable[[], Iterable[Entry]]] = {
        "uniform": lambda: _uniform(rivals),
        "by hand": lambda: _by_hand(rivals),
        "random": lambda: _random(rivals),
        "modelopt assignment": lambda: _handed_over(rivals),
        "weight knapsack": lambda: _exact(rivals, "weight knapsack", rivals.probed("weight")),
        "one-step gradient": lambda: _exact(rivals, "one-step gradient", rivals.probed("stepwise")),
        "adjoint additive": lambda: _exact(rivals, "adjoint additive", rivals.ours, "ours"),
        "one-step ablation": lambda: _exact(rivals, "one-step ablation", _one_step(rivals)),
        "whole ablation": lambda: _exact(rivals, "whole ablation", rivals.probed("ablation", ABLATED)),
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
    """modelopt's widths as our formats."""
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
    truth = rivals.probed("ablation", ABLATED)
    for share in SHARES:
        yield rivals.write("PSNR threshold", thresholded(rivals.plan, truth, share), share)


def _exact(rivals: Rivals, family: str, table: SensitivityTable, kind: str = "assignment") -> Iterator[Entry]:
    plan = rivals.plan
    for share in SHARES:
        problem = Problem(plan.layers, plan.formats, table, plan.account, int(share * plan.account.reference))
        chosen = problem.choices(problem.solve())
        yield rivals.write(family, {name: choice.format for name, choice in chosen.items()}, share, kind)


def random_formats(plan: Plan, share: float, seed: int) -> dict[str, Format]:
    """A feasible policy that nothing more fits into: narrowed layer by layer at random, then widened at random."""
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


def thresholded(plan: Plan, table: SensitivityTable, share: float) -> dict[str, Format]:
    """The smallest format below an error threshold for each layer, at the lowest threshold that fits."""
    score = np.array([[table.score(i, f) for f in plan.formats] for i in range(len(plan.layers))])
    sizes = np.array([[plan.account.layer(layer.name, f) for f in plan.formats] for layer in plan.layers])
    budget = share * plan.account.reference - plan.account.fixed
    for threshold in sorted({0.0, *score[np.isfinite(score)].tolist()}):
        allowed = np.where(score <= threshold, sizes, np.iinfo(np.int64).max)
        chosen = allowed.argmin(1)
        if sizes[np.arange(len(sizes)), chosen].sum() <= budget:
            return {layer.name: plan.formats[i] for layer, i in zip(plan.layers, chosen, strict=True)}
    raise ValueError(f"no threshold fits {share:.0%}: {FP16} is the only format of some layer")
