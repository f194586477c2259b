"""Hadamard rotation of runs of weights, so that no weight of a group stands out.

An orthogonal rotation spreads an outlier over its whole run: the rotated weights are nearly normal, with a smaller
range for the same power (Ashkboos et al. 2024, "QuaRot", section 4). Here it is undone when the weight is dequantized,
so it costs no bytes and asks nothing of the activations. The matrix is symmetric and orthogonal, its own inverse.
"""

from __future__ import annotations

import torch


def hadamard(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Each run of `size` values times the Hadamard matrix of Sylvester's construction, divided by sqrt(size).

    The butterflies add in a fixed order, so every device gives the same bits.

    Args:
        rows: float32, shape (..., K).
        size: a power of two that divides K.
    """
    runs = rows.unflatten(-1, (-1, size))
    half = 1
    while half < size:
        pairs = runs.unflatten(-1, (-1, 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        runs = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half *= 2
    return runs.flatten(-2) * size**-0.5
