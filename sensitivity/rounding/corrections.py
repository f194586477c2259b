"""Finds corrected biases that the storage dtype cannot hold. They stay uncorrected, and the table says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from bitpolicy.kernels.layers import Quantizable
from bitpolicy.policies.apply import quantize_layer
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.table import SensitivityTable

_WORST = 4.0  # |Q(W) - W| / |W| of a row; no useful rounding has an error this large


def beyond_range(
    table: SensitivityTable, layers: Mapping[str, Quantizable], *, quantization: Quantization
) -> Iterator[tuple[int, int]]:
    """(layer, column of the format) where `table` corrects the bias but the storage dtype cannot hold the result."""
    means, storage = quantization.calibration.input_means, quantization.storage
    for i, name in enumerate(table.layers):
        layer = layers[name]
        if name not in means or not _may_leave(layer, means[name], storage):
            continue
        for j, format in enumerate(table.formats):
            choice = table.choice(i, format)
            wanted = choice.bias_correction and format.fits(layer.weight.shape)
            if wanted and quantize_layer(name, layer, choice, quantization=quantization).left_as_it_was:
                yield i, j


def _may_leave(layer: Quantizable, mean: torch.Tensor, storage: torch.dtype) -> bool:
    """Whether |b| + |dW| |E[x]|, a bound by the Cauchy-Schwarz inequality, exceeds the range of the dtype."""
    if layer.bias is None:
        return False
    rows = layer.weight.detach().float().flatten(1).norm(dim=1).max()
    most = layer.bias.detach().float().abs().max() + _WORST * rows * mean.float().norm().to(rows.device)
    return not bool(most <= torch.finfo(storage).max)
