"""Chooses a rounding method for each format and layer, from a few noisy squared sketches of each method.

A score is a mean of R squared sketches, with a relative standard deviation of about sqrt(2 / R). Among nearly equal
methods, the one with the lowest score is there by chance, and its score is too low (the winner's curse; Efron 2011,
"Tweedie's formula and selection bias"). So a method is replaced only by one that is better beyond doubt. Sketches are
paired, because all methods are measured along the same probe vectors: the mean over r of

    s_r(q*)^2 - s_r(q)^2

has to be above zero by a one-sided Student's t-test ("Student" 1908) at the level of two standard errors. If several
methods pass, the best is taken. First, formats may leave the usual method. They are judged by the sum over layers,
which is what `SensitivityTable.additive_error` predicts for a model entirely in this format. Then, layers may leave the
method of their format.

There is no correction for the number of tests. A layer that deviates by chance takes a nearly equal method, which costs
almost nothing. A level that keeps all layers right at once (Benjamini and Hochberg 1995, 5%) lets none deviate.
docs/decisions/rounding.md has the numbers.
"""

from __future__ import annotations

import torch
from scipy.stats import t

_LEVEL = 0.0228  # the probability of a normal variable beyond two standard deviations, on one side


def chosen(power: torch.Tensor, usual: int) -> torch.Tensor:
    """The rounding method of each layer and format.

    Args:
        power: squared sketches, float64, shape (R, layers, formats, quantizers), >= 0.
        usual: index of the default method.

    Returns:
        Indices, int64, shape (layers, formats).
    """
    formats = torch.full(power.shape[2:3], usual)
    of_format = _better(power.sum(1), formats)
    return _better(power, of_format.expand(power.shape[1:3]))


def _better(power: torch.Tensor, from_: torch.Tensor) -> torch.Tensor:
    """`from_`, indices of shape (...), or whatever is better beyond doubt by `power`, shape (R, ..., quantizers)."""
    if len(power) < 2:
        return from_
    held = from_[..., None]
    gain = power.gather(-1, held.expand(len(power), *held.shape)) - power
    doubt = float(t.isf(_LEVEL, len(power) - 1)) * gain.std(0) / len(power) ** 0.5
    allowed = (gain.mean(0) > doubt).scatter(-1, held, True)
    return torch.where(allowed, power.mean(0), torch.inf).argmin(-1)
