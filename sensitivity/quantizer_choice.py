"""Which of several quantizers a layer takes, when all that is known of each is a few noisy squares.

A score is a mean of R squared sketches, with a relative standard deviation of about sqrt(2 / R): of quantizers that are
nearly equal, the one of least score is there by chance, and its score is too low (the winner's curse; Efron 2011,
"Tweedie's formula and selection bias"). So a format has one quantizer for all layers, the one of least total error,

    q* = argmin_q sum_l mean_r s_r(l, q)^2,

which is what `SensitivityTable.additive_error` predicts of a model that is all in this format. A layer leaves it only
for one that is better beyond doubt: sketches are paired, as all quantizers see the same directions, and the mean of
s_r(l, q*)^2 - s_r(l, q)^2 has to be above zero by a one-sided Student's t-test ("Student" 1908) at the level of two
standard errors. Of several such the best is taken.

That is a test for each layer and quantizer, and nothing is taken off for their number: a layer that deviates by chance
does so for a near equal, which costs next to nothing, while a level that keeps all layers right at once (Benjamini and
Hochberg 1995, 5%) left the four quantizers that lost on the bundled model nowhere. docs/decisions.md has the numbers.
"""

from __future__ import annotations

import torch
from scipy.stats import t

_LEVEL = 0.0228  # of a normal variable beyond two standard deviations, on one side


def chosen(power: torch.Tensor) -> torch.Tensor:
    """The quantizer of each layer and format.

    Args:
        power: squared sketches, float64, shape (R, layers, formats, quantizers), >= 0.

    Returns:
        Indices, int64, shape (layers, formats); the first of equals.
    """
    score = power.mean(0)
    best = score.sum(0).argmin(-1).expand(score.shape[:2])[..., None]
    if len(power) < 2:
        return best[..., 0]
    gain = power.gather(-1, best.expand(len(power), *best.shape)) - power
    doubt = float(t.isf(_LEVEL, len(power) - 1)) * gain.std(0) / len(power) ** 0.5
    allowed = (gain.mean(0) > doubt).scatter(-1, best, True)
    return torch.where(allowed, score, torch.inf).argmin(-1)
