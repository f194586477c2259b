"""How errors enter at each sampling step, what the sampler does to them, and how steps add up.

The error dx_0 of a layer is the sum over steps t of the errors dx_t that enter there. If every step errs in the same
direction and by the same amount, its power is T times the sum of the steps' powers. If the steps are independent, it is
just that sum:

    coherence = E|sum_t dx_t|^2 / sum_t E|dx_t|^2, between 0 and (sum_t |dx_t|)^2 / sum_t |dx_t|^2 <= T.

Steps that agree reach the upper end. It is T if they all have the same size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bitpolicy.report.groups import Group
from bitpolicy.report.inputs import Probed
from bitpolicy.sensitivity.probes.error_split import ErrorSplit


def amplification(probed: Probed, split: ErrorSplit, column: int, group: Group | None = None) -> np.ndarray:
    """|dx_0| / |de_t| by step, median over layers, with each layer's better bias; float64, shape (T)."""
    values = probed.better_bias(split.amplification)[probed.lead :, :, column].double()
    values = values[:, probed.in_loop if group is None else list(group.members)]
    return values.median(1).values.numpy()


def local_error(probed: Probed, split: ErrorSplit, column: int, group: Group) -> np.ndarray:
    """E|de_t|^2 / E|e_t|^2 by step, median over layers; float64, shape (T)."""
    return probed.better_bias(split.local)[probed.lead :, list(group.members), column].double().median(1).values.numpy()


def by_step(probed: Probed, split: ErrorSplit) -> torch.Tensor:
    """E|dx_0|^2 / E|x_0|^2 from the error that enters at each step alone, with each layer's better bias, float32, shape
    (lead + T, L, F). Steps may add up or cancel, so their sum is not the layer's error."""
    return probed.better_bias(split.error)[1:]


def entering(probed: Probed, split: ErrorSplit, column: int, group: Group | None = None) -> np.ndarray:
    """Sum over layers of the error that enters at each step, float64, shape (T)."""
    values = by_step(probed, split)[probed.lead :, :, column].double()
    return (values if group is None else values[:, list(group.members)]).sum(1).numpy()


@dataclass(frozen=True)
class Coherence:
    """How the steps of some part of the layers' errors add up.

    Attributes:
        found: 1 for independent steps.
        limit: value for steps that agree, at the sizes they have.
    """

    found: float
    limit: float

    @property
    def agreement(self) -> float:
        """0 for independent steps, 1 for steps that agree; 0 if a single step causes the whole error."""
        return (self.found - 1) / (self.limit - 1) if self.limit > 1 else 0.0


def coherence(part: torch.Tensor) -> Coherence | None:
    """The coherence of powers of shape (1 + T, L), first the whole and then the steps, summed over layers; None if all
    are zero."""
    whole, steps = part[0].double().sum(), part[1:].double()
    apart = steps.sum()
    if apart <= 0:
        return None
    return Coherence(float(whole / apart), float(steps.sqrt().sum(0).square().sum() / apart))


def largest_step(probed: Probed, split: ErrorSplit, layer: int, column: int) -> int:
    """The step, counted from 1, at which most of a layer's error enters; 0 for outside the loop."""
    return int(by_step(probed, split)[:, layer, column].argmax()) + 1 - probed.lead
