"""How errors enter at each sampling step, what the sampler makes of them, and how steps add up.

The error dx_0 of a layer is the sum over steps t of what entered there. Its power is T times the sum of the steps'
powers if every step errs the same way and as much, and just that sum if the steps know nothing of each other:

    coherence = E|sum_t dx_t|^2 / sum_t E|dx_t|^2, between 0 and (sum_t |dx_t|)^2 / sum_t |dx_t|^2 <= T,

the upper end, which is reached by steps that agree, being T where all are of the same size.
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


def entering(probed: Probed, column: int, group: Group | None = None) -> np.ndarray:
    """Sum over layers of the error that enters at each step, float64, shape (T)."""
    assert probed.table.by_step is not None
    values = probed.table.by_step[probed.lead :, :, column].double()
    return (values if group is None else values[:, list(group.members)]).sum(1).numpy()


@dataclass(frozen=True)
class Coherence:
    """How the steps of some part of the layers' errors add up.

    Attributes:
        found: 1 for steps that are independent.
        limit: for steps that agree, at the sizes they have.
    """

    found: float
    limit: float

    @property
    def agreement(self) -> float:
        """0 for independent steps, 1 for steps that agree; 0 where a single step makes the error."""
        return (self.found - 1) / (self.limit - 1) if self.limit > 1 else 0.0


def coherence(part: torch.Tensor) -> Coherence | None:
    """Of powers of shape (1 + T, L), the whole and then the steps, summed over layers; None where all are zero."""
    whole, steps = part[0].double().sum(), part[1:].double()
    apart = steps.sum()
    if apart <= 0:
        return None
    return Coherence(float(whole / apart), float(steps.sqrt().sum(0).square().sum() / apart))


def largest_step(probed: Probed, layer: int, column: int) -> int | None:
    """The step, counted from 1, at which most of a layer's error enters, 0 for outside the loop; None where the probe
    does not tell."""
    if probed.table.by_step is None:
        return None
    return int(probed.table.by_step[:, layer, column].argmax()) + 1 - probed.lead
