"""How much of a choice is noise in the sketches, and whether weighted single steps would choose better.

All figures are dB of the additive error A = sum_l e(l, z_l), for policies solved exactly at the same bytes:

    halves      a policy from the sketches of one half of the samples, scored with the other half's A, behind that
                half's own optimum; in both directions
    one step    one-step gradients scored with one half, behind the policy from the other half; below zero they choose
                better than half of the sketches
    plain       one-step gradients scored with all sketches, behind the optimum
    weighted    the same, with each step weighted by sum e(t) / sum e_step(t): how much the sampler amplifies an error
                at step t, averaged over layers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from peers.entry import SHARES
from peers.rivals import Rivals

from bitpolicy.kernels.formats.format import Format
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.probes.error_split import ErrorSplit
from bitpolicy.sensitivity.table import SensitivityTable

_HEADS = ("of FP16", "halves", "one step on halves", "plain", "weighted")


def noise_lines(rivals: Rivals) -> list[str]:
    """The table in Markdown."""
    halves, steps = rivals.ours.halves(), rivals.probed("stepwise")
    assert halves is not None
    rows = [_row(rivals, share, halves, steps, weighted(rivals.ours, steps, rivals.split())) for share in SHARES]
    return ["| " + " | ".join(cells) + " |" for cells in (_HEADS, ["---"] * len(_HEADS), *rows)]


def weighted(ours: SensitivityTable, steps: SensitivityTable, split: ErrorSplit) -> SensitivityTable:
    """Errors of single steps, summed with the sampler's weights."""
    error, local = (torch.where(ours.corrected, part[1], part[0]).double() for part in (split.error, split.local))
    factor, alone = error[1:].sum((1, 2)) / local.sum((1, 2)), local
    return replace(steps, error=(factor[:, None, None] * alone).sum(0))


def _row(
    rivals: Rivals,
    share: float,
    halves: tuple[SensitivityTable, SensitivityTable],
    steps: SensitivityTable,
    better: SensitivityTable,
) -> list[str]:
    def solved(table: SensitivityTable) -> dict[str, Format]:
        plan = rivals.plan
        problem = Problem(
            plan.layers, plan.formats, plan.account, table=table, budget=int(share * plan.account.reference)
        )
        return {layer.name: plan.formats[f] for layer, f in zip(plan.layers, problem.solve().formats, strict=True)}

    own = [solved(half) for half in halves]
    optimum, single = solved(rivals.ours), solved(steps)
    crossed = [_behind(half, own[1 - i], own[i]) for i, half in enumerate(halves)]
    on_halves = [_behind(half, single, own[1 - i]) for i, half in enumerate(halves)]
    whole = [_behind(rivals.ours, policy, optimum) for policy in (single, solved(better))]
    pairs = [", ".join(f"{value:.2f}" for value in values) for values in (crossed, on_halves)]
    return [f"{share:.0%}", *pairs, *(f"{value:.2f}" for value in whole)]


def _behind(table: SensitivityTable, policy: Mapping[str, Format], other: Mapping[str, Format]) -> float:
    errors = [sum(table.score(i, z[layer]) for i, layer in enumerate(table.layers)) for z in (policy, other)]
    return float(10 * np.log10(errors[0] / errors[1]))
