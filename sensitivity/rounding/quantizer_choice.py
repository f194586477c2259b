"""Which of several quantizers a format takes, and a layer, when all that is known of each is a few noisy squares.

A score is a mean of R squared sketches, with a relative standard deviation of about sqrt(2 / R): of quantizers that are
nearly equal, the one of least score is there by chance, and its score is too low (the winner's curse; Efron 2011,
"Tweedie's formula and selection bias"). So nobody leaves a quantizer but for one that is better beyond doubt. Sketches
are paired, as all quantizers see the same directions: the mean over r of

    s_r(q*)^2 - s_r(q)^2

has to be above zero by a one-sided Student's t-test ("Student" 1908) at the level of two standard errors. Of several
such the best is taken. First the formats leave the usual quantizer, judged by the sum over layers, which is what
`SensitivityTable.additive_error` predicts of a model that is all in this format; then the layers leave their format's.

Nothing is taken off for the number of tests: a layer that deviates by chance does so for a near equal, which costs next
to nothing, while a level that keeps all layers right at once (Benjamini and Hochberg 1995, 5%) lets none deviate.
docs/decisions.md has the numbers.
"""

from __future__ import annotations

import torch
from scipy.stats import t

_LEVEL = 0.0228  # of a normal variable beyond two standard deviations, on one side


def chosen(power: torch.Tensor, usual: int) -> torch.Tensor:
    """The quantizer of each layer and format.

    Args:
        power: squared sketches, float64, shape (R, layers, formats, quantizers), >= 0.
        usual: index of the quantizer to take where nothing speaks against it.

    Returns:
        Indices, int64, shape (layers, formats).
    """
    formats = torch.full(power.shape[2:3], usual)
    of_format = _left(power.sum(1), formats)
    return _left(power, of_format.expand(power.shape[1:3]))


def _left(power: torch.Tensor, from_: torch.Tensor) -> torch.Tensor:
    """`from_`, indices of shape (...), or what is better beyond doubt by `power`, shape (R, ..., quantizers)."""
    if len(power) < 2:
        return from_
    held = from_[..., None]
    gain = power.gather(-1, held.expand(len(power), *held.shape)) - power
    doubt = float(t.isf(_LEVEL, len(power) - 1)) * gain.std(0) / len(power) ** 0.5
    allowed = (gain.mean(0) > doubt).scatter(-1, held, True)
    return torch.where(allowed, power.mean(0), torch.inf).argmin(-1)
