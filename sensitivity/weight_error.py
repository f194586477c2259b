"""The data-free probe: |Q(W) - W|^2 / |W|^2 of each layer. For when nothing can be run; it says little about images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bitpolicy.kernels.format import Format
from bitpolicy.kernels.layers import quantizable_layers


def weight_errors(denoiser: nn.Module, formats: Sequence[Format], storage: torch.dtype) -> torch.Tensor:
    """Relative weight error, float64, shape (layers, formats)."""
    rows = []
    for _, layer in quantizable_layers(denoiser):
        weight = layer.weight.detach().to(storage)
        power = weight.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        stored = [f.dequantize(f.quantize(weight), weight.shape, torch.float32) for f in formats]
        rows.append(torch.stack([(w.double() - weight.double()).square().sum() / power for w in stored]))
    return torch.stack(rows).cpu()
