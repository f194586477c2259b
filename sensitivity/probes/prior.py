"""The prior probe: the weight error of a layer, times what an error of that size did in other models.

It runs nothing. For a layer l in format f,

    score = |Q(W) - W|^2 / |W|^2 * exp(b . x_l),

where x_l describes the layer: its role, stage, kernel, inputs and depth. The coefficients b are a ridge regression of
log(adjoint score / relative weight error) on x_l over five small trained models (`scripts/why_int4_hurts.py prior`).
Only ratios between layers of one model mean anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bitpolicy.sensitivity.inventory import Layer

_RIDGE = 4.0  # observations' worth of evidence against each coefficient
_FILE = Path(__file__).with_name("prior.json")


@dataclass(frozen=True)
class Prior:
    """Coefficients by the name of what they multiply. A name that they lack counts as zero."""

    coefficients: Mapping[str, float]

    @classmethod
    def shipped(cls) -> Prior:
        """The prior that comes with the package."""
        return cls(json.loads(_FILE.read_text(encoding="utf-8")))

    def log_effects(self, layers: Sequence[Layer]) -> torch.Tensor:
        """log of the error that a relative weight error of 1 is expected to cause, up to a constant, float64, shape
        (len(layers))."""
        values = [
            sum(self.coefficients.get(name, 0.0) * value for name, value in described.items())
            for described in _described(layers)
        ]
        return torch.tensor(values, dtype=torch.float64)


def fitted(models: Iterable[tuple[Sequence[Layer], torch.Tensor]]) -> Prior:
    """The prior that explains several models best.

    Args:
        models: the layers of each, and log(error / relative weight error) of each layer, float64, shape (layers). Every
            model has a constant of its own, and all models weigh the same.
    """
    rows, values, weights = [], [], []
    for layers, effects in models:
        described = _described(layers)
        rows.append(described)
        values.append(effects - effects.mean())
        weights.append(torch.full((len(layers),), 1 / math.sqrt(len(layers)), dtype=torch.float64))
    names = sorted({name for described in rows for row in described for name in row})
    blocks = [
        torch.tensor([[row.get(name, 0.0) for name in names] for row in described], dtype=torch.float64)
        for described in rows
    ]
    x = torch.cat([block - block.mean(0) for block in blocks])
    y, weight = torch.cat(values), torch.cat(weights)
    x, y = x * weight[:, None], y * weight
    count = sum(map(len, rows)) / len(rows)
    solved = torch.linalg.solve(x.T @ x + _RIDGE / count * torch.eye(len(names), dtype=torch.float64), x.T @ y)
    return Prior({name: round(float(value), 4) for name, value in zip(names, solved, strict=True)})


def _described(layers: Sequence[Layer]) -> list[dict[str, float]]:
    total = sum(math.prod(layer.shape) for layer in layers)
    last = max(len(layers) - 1, 1)
    return [_description(layer, place / last, total) for place, layer in enumerate(layers)]


def _description(layer: Layer, depth: float, total: int) -> dict[str, float]:
    """Named numbers that describe a layer.

    Args:
        depth: its place among the layers, from 0 to 1.
        total: weights of all layers.
    """
    inputs = math.prod(layer.shape[1:])
    return {
        f"role {layer.role}": 1.0,
        f"stage {layer.stage}": 1.0,
        "log inputs": math.log(inputs),
        "log share of weights": math.log(math.prod(layer.shape) / total),
        "depth": depth,
        "depth^2": depth**2,
    }
