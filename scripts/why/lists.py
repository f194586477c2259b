"""Which layers must never be INT4 and which are free at INT4, by role, and a prior that is learned from other models.

`lists` solves for each size with the adjoint probe's errors. A layer is never INT4 at a size if INT4 instead of the
solution's choice would cost more than 1 dB of the final latent; it is free if INT4 costs it less than 0.01 dB compared
with FP16 (`bitpolicy.report.lists`). The layers of each model are written to CSV files, too.

`prior` predicts each layer's effect, the error of the final latent divided by the relative error of its weight, from
its role, stage and shape: a ridge regression of the logarithm, fitted to the other models only. A policy that is
optimal under (prior x weight error), and one that is optimal under the weight error, are then judged by the probe's own
errors: how many dB worse they are than the exact solution.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.entry import SHARES
from scipy.stats import spearmanr
from why.subjects import Subject

from bitpolicy.report.inputs import Probed
from bitpolicy.report.lists import make_lists
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.probes.prior import Prior, fitted
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.table_files import ModelContext

SIZES = ("30%", "38%", "45%")
RELATED = ("unet", "lcm")  # one was distilled from the other, so neither may learn from the other


def lists(subject: Subject, folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each size and role: its layers, and how many of them are never INT4 or free at INT4."""
    plan = subject.rivals.plan
    probed = Probed(subject.rivals.ours, ModelContext(plan.layers, plan.account, subject.name))
    for size in SIZES:
        found = make_lists(probed, size)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{subject.name}-{size.removesuffix('%')}.csv").write_text(found.csv())
        of_role = defaultdict(list)
        for marked in found.layers:
            of_role[marked.layer.role].append(marked)
        for role, layers in sorted(of_role.items()):
            never, free = sum(m.never for m in layers), sum(m.free for m in layers)
            yield {"size": size, "role": role, "layers": len(layers), "never": never, "free": free}


@dataclass(frozen=True)
class Probes:
    """The errors of one model's layers under the adjoint and the weight probe."""

    problem: Problem
    weight: SensitivityTable

    @classmethod
    def of(cls, subject: Subject) -> Probes:
        rivals = subject.rivals
        plan = rivals.plan
        problem = Problem(plan.layers, plan.formats, plan.account, table=rivals.ours, budget=plan.account.reference)
        return cls(problem, rivals.probed("weight"))

    @property
    def effect(self) -> torch.Tensor:
        """log of error / weight error, averaged over the formats, float64, shape (layers)."""
        tiny = 1e-30
        return (self.problem.table.error.clamp(min=tiny).log() - self.weight.error.clamp(min=tiny).log()).mean(1)

    def loss(self, table: SensitivityTable, share: float) -> float:
        """How many dB the policy that is optimal under `table` is worse than the exact solution."""
        budget = int(share * self.problem.account.reference)
        chosen, best = (replace(self.problem, table=t).solve(budget=budget) for t in (table, self.problem.table))
        errors = self.problem.errors()
        found = errors[np.arange(len(errors)), chosen.formats].sum()
        return 10 * float(np.log10(found / best.error))


def prior(subjects: Sequence[Subject]) -> Iterator[dict[str, Any]]:
    """One row per model, whose prior is fitted to the others."""
    probes = {subject.name: Probes.of(subject) for subject in subjects}
    for name, probe in probes.items():
        related = RELATED if name in RELATED else (name,)
        others = [(p.problem.inventory, p.effect) for other, p in probes.items() if other not in related]
        learned = fitted(others)
        yield {"left out": name, **_judged(probe, learned)}


def whole_prior(subjects: Sequence[Subject]) -> Prior:
    """The prior that is fitted to all models."""
    return fitted([(p.problem.inventory, p.effect) for p in map(Probes.of, subjects)])


def _judged(probe: Probes, learned: Prior) -> dict[str, float]:
    predicted = learned.log_effects(probe.problem.inventory)
    guess = replace(probe.weight, error=probe.weight.error * predicted.exp()[:, None])
    row = {"Spearman": float(spearmanr(predicted, probe.effect).statistic)}
    for share in SHARES:
        row[f"prior, {share:.0%}"] = probe.loss(guess, share)
        row[f"weight, {share:.0%}"] = probe.loss(probe.weight, share)
    return row
