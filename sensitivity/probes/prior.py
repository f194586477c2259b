"""The prior probe: a layer's weight error, times what a weight error of that size did to such layers of other models.

It runs nothing. For a layer l in format f,

    score = |Q(W) - W|^2 / |W|^2 * exp(b . x_l),

where x_l describes the layer: its role, its stage, the length of its rows and its share of the weights. b is a ridge
regression of log(adjoint score / relative weight error) on x_l over small trained models: three U-Nets and two
transformers (`scripts/why_int4_hurts.py prior`). Only the ratios between layers of one model mean anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.probes.weight import WeightProbe
from bitpolicy.sensitivity.table import SensitivityTable

_RIDGE = 4.0  # layers' worth of evidence for a coefficient of zero


@dataclass(frozen=True)
class Prior:
    """Coefficients by the name of what they multiply. A name that they lack counts as zero."""

    coefficients: Mapping[str, float]

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
    """Named numbers that describe each layer."""
    total = sum(math.prod(layer.shape) for layer in layers)
    return [
        {
            f"role {layer.role}": 1.0,
            f"stage {layer.stage}": 1.0,
            "log row length": math.log(math.prod(layer.shape[1:])),
            "log share of weights": math.log(math.prod(layer.shape) / total),
        }
        for layer in layers
    ]


LEARNED = Prior(
    MappingProxyType(
        {
            "log row length": 0.0423,
            "log share of weights": -1.3081,
            "role attention_out": -0.947,
            "role attention_qkv": -1.833,
            "role context_embedding": -0.0639,
            "role conv": 1.8445,
            "role cross_attention_out": -0.2525,
            "role cross_attention_qkv": -1.6244,
            "role feed_forward": 2.1132,
            "role input_stem": 0.1389,
            "role modulation": 0.8281,
            "role output_head": -0.0818,
            "role projection": 0.9032,
            "role resample": 2.2159,
            "role shortcut": 0.7317,
            "role timestep_embedding": -3.9727,
            "stage decoder": 2.4435,
            "stage early": -0.7815,
            "stage encoder": 0.2428,
            "stage ends": 1.4798,
            "stage late": -2.3602,
            "stage middle": -1.0243,
        }
    )
)


class PriorProbe(WeightProbe):
    """Scores layers by their weight errors and by what they are, and runs nothing."""

    name = "prior"
    outside_loop = False

    def table(self) -> SensitivityTable:
        """The scores, with every bias corrected."""
        found = super().table()
        return replace(found, error=found.error * LEARNED.log_effects(self._inputs.inventory).exp()[:, None])
