"""Shrinkage: formats of one layer lend each other evidence, so that fewer probe vectors are needed.

A score is a mean over a few random sketches, and therefore noisy. But what a layer does to the image depends little on
the format: if rounding errors are spread evenly over a weight, its score is the weight error times a constant of the
layer. So in

    log e(l, f) = log w(l, f) + a_l + d(l, f),

with e the score and w the relative weight error, d is partly real and partly noise. The estimate keeps the share k of
it that two halves of the sketches agree on,

    e'(l, f) = w(l, f) exp(a_l + k d(l, f)),    k = cov(d_1, d_2) / (cov(d_1, d_2) + var(noise)),

where d_1 and d_2 are from the halves, over all layers and formats, and the noise is that of all sketches: half of what
a single half has (empirical Bayes with a normal prior: Efron and Morris 1975, "Data analysis using Stein's estimator").
"""

from __future__ import annotations

import torch

from bitpolicy.sensitivity.table import SensitivityTable

_FEWEST = 8  # sketches, below which halves say too little


def can_shrink(sketches: int, formats: int, rounds_inputs: bool) -> bool:
    """Whether there are enough sketches, and several packed formats. If layers round their inputs, there is nothing to
    shrink towards, because that part of an error is not proportional to the weight's."""
    return sketches >= _FEWEST and formats > 1 and not rounds_inputs


def shrunk(table: SensitivityTable, weight_error: torch.Tensor) -> SensitivityTable:
    """The table with shrunk errors. Its sketches are rescaled to match.

    Args:
        table: one with sketches, for which `can_shrink` holds.
        weight_error: |Q(W) - W|^2 / |W|^2 of every rounding method of the table, format by format, float64, shape (L, F
            x methods); zero where a format does not fit.
    """
    sketches = table.sketches
    assert sketches is not None
    methods = weight_error.unflatten(1, (len(table.formats), -1))
    chosen = torch.zeros(table.error.shape, dtype=torch.int64) if table.quantizer is None else table.quantizer.long()
    weight_error = methods.gather(2, chosen[..., None])[..., 0]
    parts = [sketches[i::2].double().square().mean(0) for i in (0, 1)]
    known = (weight_error > 0) & (parts[0] > 0) & (parts[1] > 0)
    known &= (known.sum(1) > 1)[:, None]
    if not known.any():
        return table
    halves = [_deviation(part, weight_error, known)[known] for part in parts]
    share = kept_share(*halves)
    deviation = _deviation(table.error, weight_error, known)
    error = torch.where(known, table.error * ((share - 1) * deviation).exp(), table.error)
    return table.rescaled(error)


def kept_share(first: torch.Tensor, second: torch.Tensor) -> float:
    """k: the share of a deviation that is real, in the mean of two estimates with independent noise, in [0, 1].

    Args:
        first, second: deviations with mean 0, any shape.
    """
    real = float((first * second).mean())
    both = float((first.square() + second.square()).mean()) / 2
    noise = max(both - real, 0.0) / 2
    return max(real, 0.0) / (max(real, 0.0) + noise) if real > 0 else 0.0


def _deviation(error: torch.Tensor, weight_error: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """d, float64, shape (L, F); zero where it is not known."""
    ratio = torch.where(known, error / weight_error.clamp(min=torch.finfo(torch.float64).tiny), 1.0).log()
    of_layer = (ratio * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    return torch.where(known, ratio - of_layer, 0.0)
