"""What to do with layers in a format that a target does not have: refuse all at once, or round them anew.

The nearest format is one that the target holds, with as many bits or more, fewest bits first; of those the one closest
in bytes, then the one of least weight error; FP16 where there is none. The layer is rounded from its original weight,
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
    """One layer that was rounded anew for a target.

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
    """Say which layers a target does not hold, and what would help.

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
        f"{exporter.title} cannot hold {len(unheld)} layers as this policy has them ({'; '.join(parts)}): {first}. "
        "Round these anew to the nearest format it has with --requantize, or search again with "
        f"--target {exporter.name} --formats {','.join(exporter.suggested)}; "
        f"`bitpolicy formats --target {exporter.name}` says what it holds"
    )


def nearest(exporter: Exporter, layer: Layer, weight: torch.Tensor) -> Format:
    """The nearest format to the layer's own that the target holds.

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
) -> Requantized:
    """What one layer becomes for a target that does not hold it as it is.

    Args:
        weight: the original one, in the storage dtype.
    """
    format = nearest(exporter, layer, weight)
    quantizer = "mse" if choice.quantizer in HESSIANS else choice.quantizer
    after = Choice(format, choice.bias_correction, quantizer) if format.packed else Choice(format)
    errors = [
        relative_error(one.format, stored_weight(layer.name, weight, one, calibration), weight)
        for one in (choice, after)
    ]
    return Requantized(layer.name, choice, after, *errors)


def relative_error(format: Format, tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> float:
    """|Q(W) - W| / |W|; of a weight of zeros, 0."""
    back = format.dequantize(tensors, weight.shape, torch.float32)
    size = float(weight.float().norm())
    return float((back - weight.float()).norm()) / size if size else 0.0


def _bits(format: Format) -> int:
    return int(format.parameters()["bits"])
