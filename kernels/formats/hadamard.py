"""Hadamard rotation of groups of weights, which removes outliers.

An orthogonal rotation spreads an outlier over its whole group: the rotated weights are nearly normal, with a smaller
range for the same power (Ashkboos et al. 2024, "QuaRot", section 4). The rotation is undone when the weight is
dequantized, so it costs no bytes and leaves activations alone. The matrix is symmetric and orthogonal, and so its own
inverse.
"""

from __future__ import annotations

import torch


def hadamard(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Multiply each block of `size` values by Sylvester's Hadamard matrix, divided by sqrt(size).

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
