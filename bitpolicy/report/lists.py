"""Which layers must not be INT4 and which may be, at one budget, and how hand-written lists compare.

The exact solver's policy has the additive error E = sum_l e(l, f_l). For each layer, with f the smallest format:

    cost = 10 log10((E - e_chosen + e_f) / E)              dB that f would cost instead of the chosen format
    own  = 10 log10((E - e_chosen + e_f) / (E - e_chosen)) dB that f costs compared with FP16, whatever was chosen

A layer whose cost exceeds 1 dB is never `f` at this budget; one whose own cost is below 0.01 dB is free at `f`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16
from bitpolicy.report.inputs import Probed
from bitpolicy.search.budget import Budget, BudgetError
from bitpolicy.search.knapsack import Solution, solve
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.inventory import Layer

NEVER_DB, FREE_DB = 1.0, 0.01
DEFAULT_BUDGET = "45%"


@dataclass(frozen=True)
class Marked:
    """One layer at one budget.

    Attributes:
        place: index in the table.
        nbytes: bytes at FP16.
        chosen: the solution's format.
        cost, own: in dB, as above; infinite if nothing else has an error.
        by_hand: whether the usual hand-written lists name it: time embedding, first and last layer.
    """

    place: int
    layer: Layer
    nbytes: int
    chosen: Format
    cost: float
    own: float
    by_hand: bool

    @property
    def never(self) -> bool:
        return self.cost > NEVER_DB

    @property
    def free(self) -> bool:
        return self.own < FREE_DB

    @property
    def verdict(self) -> str:
        return "never" if self.never else "free" if self.free else "between"


@dataclass(frozen=True)
class Lists:
    """The verdict on every layer at one budget.

    Attributes:
        budget: in bytes.
        default: whether this is the default budget.
        small: the format in question.
        nbytes: bytes of the solution.
        error: its additive error E.
        counts: number of layers in each format, by name.
        layers: all layers, in the table's order.
        pinned_db: cost in dB of keeping the hand-written list at FP16 and solving for the rest within the same bytes;
            None if that does not fit.
    """

    budget: Budget
    default: bool
    small: Format
    nbytes: int
    error: float
    counts: dict[str, int]
    layers: tuple[Marked, ...]
    pinned_db: float | None

    @property
    def never(self) -> list[Marked]:
        return sorted((m for m in self.layers if m.never), key=lambda m: (-m.cost, m.place))

    @property
    def free(self) -> list[Marked]:
        return sorted((m for m in self.layers if m.free), key=lambda m: (-m.nbytes, m.place))

    @property
    def by_hand(self) -> list[Marked]:
        return [m for m in self.layers if m.by_hand]

    def csv(self) -> str:
        """One row per layer, in the table's order: the solution's choice, both costs in dB, and the verdict."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        small = self.small.name
        rows.writerow(["layer", "role", "stage", "bytes_fp16", "chosen", f"cost_db_{small}", f"own_db_{small}", small])
        for m in self.layers:
            decibels = (f"{m.cost:.4f}", f"{m.own:.4f}")
            rows.writerow([m.layer.name, m.layer.role, m.layer.stage, m.nbytes, m.chosen.name, *decibels, m.verdict])
        return text.getvalue()


def make_lists(probed: Probed, asked: str | None) -> Lists:
    """Solve for the budget `asked`; without it, for the budget of the folder's policy, or 45% of FP16.

    Raises:
        BudgetError: it is not a size, or no policy fits.
    """
    policy = probed.policy
    recorded = policy.budget.asked if policy is not None and policy.budget is not None else None
    budget = Budget.parse(asked or recorded or DEFAULT_BUDGET, probed.account)
    formats = (*probed.table.formats, FP16)
    problem = Problem(probed.layers, formats, probed.account, table=probed.table, budget=budget.nbytes)
    budget.require(problem.smallest, [f.name for f in formats])
    solution = problem.solve()
    layers = tuple(_marked(probed, solution, formats, place) for place in range(len(probed.layers)))
    counts = {f.name: sum(m.chosen == f for m in layers) for f in formats}
    nbytes = solution.nbytes + probed.account.fixed
    pinned = _pinned(probed, formats, budget, [m.place for m in layers if m.by_hand])
    return Lists(
        budget, asked is None, probed.formats[0], nbytes, solution.error, counts, layers, _db(pinned, solution.error)
    )


def _marked(probed: Probed, solution: Solution, formats: Sequence[Format], place: int) -> Marked:
    layer, chosen = probed.layers[place], formats[solution.formats[place]]
    small = probed.table.score(place, probed.formats[0])
    others = max(0.0, solution.error - probed.table.score(place, chosen))
    cost, own = (_db(others + small, before) for before in (solution.error, others))
    assert cost is not None
    assert own is not None
    return Marked(place, layer, probed.layer_bytes(place), chosen, cost, own, _on_hand_list(layer))


def _on_hand_list(layer: Layer) -> bool:
    at_an_end = layer.role in ("input_stem", "output_head")
    return at_an_end or (layer.role == "timestep_embedding" and layer.stage == "ends")


def _pinned(probed: Probed, formats: Sequence[Format], budget: Budget, pinned: Sequence[int]) -> float | None:
    """The least error with the layers at `pinned` kept at FP16."""
    rest = [place for place in range(len(probed.layers)) if place not in pinned]
    left = budget.nbytes - probed.account.fixed - sum(probed.layer_bytes(place) for place in pinned)
    if not rest:
        return 0.0 if left >= 0 else None
    error = np.array([[probed.table.score(place, f) for f in formats] for place in rest])
    nbytes = np.array([[probed.layer_bytes(place, f) for f in formats] for place in rest])
    try:
        return solve(error, nbytes, left).error
    except BudgetError:
        return None


def _db(after: float | None, before: float) -> float | None:
    """10 log10(after / before): 0 if both are zero, infinite if only one of them is."""
    if after is None:
        return None
    if after <= 0:
        return 0.0 if before <= 0 else -math.inf
    return 10 * math.log10(after / before) if before > 0 else math.inf
