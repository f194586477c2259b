"""The candidates for every layer: formats, and for each format the rounding methods to try."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16
from bitpolicy.kernels.layers import HasModules, quantizable_layers
from bitpolicy.kernels.quantizers.named import RTN

_MANY = 16  # up to this many packed formats are all probed; of more, only the most useful
_PER_WIDTH = 2  # most useful formats kept for each number of bits
_ROWS = 32  # output channels that a layer is judged by


@dataclass(frozen=True)
class Candidate:
    """A packed format and a rounding method."""

    format: Format
    quantizer: str = RTN


def candidates(formats: Iterable[Format], quantizers: Sequence[str] = (RTN,)) -> tuple[Candidate, ...]:
    """Every packed format with every rounding method, format by format."""
    return tuple(Candidate(f, quantizer) for f in formats if f.packed for quantizer in quantizers)


def useful_formats(model: HasModules, formats: Sequence[Format], storage: torch.dtype) -> tuple[Format, ...]:
    """`formats` or, if there are very many, those worth a probe.

    These are, for each width, the two formats that are on the lower convex hull of bytes against weight error for the
    most weights. Across layers, weight error says little; within one layer, it ranks formats. No exchange of bytes
    between layers needs a format above that hull (Sinha and Zoltners 1979, section 2).
    """
    if len(formats) <= _MANY + 1:
        return tuple(formats)
    weights: Counter[Format] = Counter()
    for _, layer in quantizable_layers(model):
        for format in _on_hull(layer.weight.detach().to(storage), formats):
            weights[format] += layer.weight.numel()
    kept: list[Format] = []
    for bits in sorted({_bits(format) for format in formats if format.packed}):
        ranked = sorted((f for f in formats if _bits(f) == bits and weights[f]), key=lambda f: -weights[f])
        kept += ranked[:_PER_WIDTH]
    return (*kept, FP16)


def _bits(format: Format) -> int:
    return int(format.parameters()["bits"])


def _on_hull(weight: torch.Tensor, formats: Sequence[Format]) -> list[Format]:
    """Formats on the lower convex hull of one weight, from the smallest to FP16."""
    part = weight[torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long()]
    points = []
    for format in formats:
        if format.fits(weight.shape):
            back = format.dequantize(format.quantize(part), part.shape, torch.float32)
            error = float((back - part).double().square().sum()) if format.packed else 0.0
            points.append((format.nbytes(weight.shape, weight.dtype), error, format))
    hull: list[tuple[int, float, Format]] = []
    for point in sorted(points, key=lambda p: p[:2]):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return [format for _, _, format in hull]


def _slope(a: tuple[int, float, Format], b: tuple[int, float, Format]) -> float:
    """Change of error per byte."""
    return (b[1] - a[1]) / (b[0] - a[0])
