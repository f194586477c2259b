"""Layers in a format that a target does not have: refuse them all at once, or round them to the nearest format.

The nearest format is one that the target holds with at least as many bits: first the fewest bits, then the closest
number of bytes, then the least weight error. If there is none, it is FP16. A layer is rounded from its original weight,
never from the rounded one, so its error is that of the nearest format alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16, all_formats
from bitpolicy.kernels.quantizers.named import HESSIANS
from bitpolicy.policies.apply import stored_weight
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.exporters.exporter import Exporter, Layer
from bitpolicy.policies.policy import Choice

_SHOWN = 3  # layers named in a refusal


class TargetError(BitPolicyError):
    """A policy that a target cannot hold."""


@dataclass(frozen=True)
class Requantized:
    """One layer that was rounded to another format for a target.

    Attributes:
        before, after: its choices.
        error_before, error_after: |Q(W) - W| / |W| under them.
    """

    name: str
    before: Choice
    after: Choice
    error_before: float
    error_after: float


def refuse(exporter: Exporter, unheld: Mapping[str, Layer]) -> None:
    """Report the layers that a target does not hold, with the remedies.

    Raises:
        TargetError: always, if there are any.
    """
    if not unheld:
        return
    have: dict[str, list[Layer]] = {}
    for layer in unheld.values():
        have.setdefault(f"{layer.format.name} in a {layer.kind}", []).append(layer)
    parts = [f"{len(found)} in {what.replace(' in a ', ', ')}" for what, found in have.items()]
    first = ", ".join(list(unheld)[:_SHOWN]) + (", ..." if len(unheld) > _SHOWN else "")
    raise TargetError(
        f"{exporter.title} cannot hold {len(unheld)} layers in the policy's formats ({'; '.join(parts)}): {first}. "
        "Round them to the nearest format that it has with --requantize, or search again with "
        f"--target {exporter.name} --formats {','.join(exporter.suggested)}; "
        f"`bitpolicy formats --target {exporter.name}` lists what it holds"
    )


def nearest(exporter: Exporter, layer: Layer, weight: torch.Tensor) -> Format:
    """The format nearest to the layer's own that the target holds.

    Args:
        weight: in the storage dtype, the layer's shape.
    """
    wanted, own = _bits(layer.format), layer.format.nbytes(layer.shape, weight.dtype)
    held = [f for f in all_formats() if f.fits(layer.shape) and exporter.holds(layer.stored_as(f)) and f.packed]
    enough = [f for f in held if _bits(f) >= wanted]
    if not enough:
        return FP16
    narrowest = min(_bits(f) for f in enough)
    apart = {f: abs(f.nbytes(layer.shape, weight.dtype) - own) for f in enough if _bits(f) == narrowest}
    closest = [f for f, distance in apart.items() if distance == min(apart.values())]
    return min(closest, key=lambda f: (relative_error(f, f.quantize(weight), weight), f.name))


def requantized(
    exporter: Exporter,
    layer: Layer,
    weight: torch.Tensor,
    choice: Choice,
    calibration: Calibration,
    format: Format | None = None,
) -> Requantized:
    """One layer, rounded to another format for a target that does not hold its own.

    Args:
        weight: the original one, in the storage dtype.
        format: the other format; None is the nearest one.
    """
    format = format or nearest(exporter, layer, weight)
    quantizer = "mse" if choice.quantizer in HESSIANS else choice.quantizer
    after = Choice(format, choice.bias_correction, quantizer) if format.packed else Choice(format)
    errors = [
        relative_error(one.format, stored_weight(layer.name, weight, one, calibration), weight)
        for one in (choice, after)
    ]
    return Requantized(layer.name, choice, after, *errors)


def relative_error(format: Format, tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> float:
    """|Q(W) - W| / |W|; 0 for a weight of zeros."""
    back = format.dequantize(tensors, weight.shape, torch.float32)
    size = float(weight.float().norm())
    return float((back - weight.float()).norm()) / size if size else 0.0


def _bits(format: Format) -> int:
    return int(format.parameters()["bits"])
