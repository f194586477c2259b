"""Tied layers: layers of diffusers' model that another program stores as one, which therefore have one format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.exporters.exporter import Exporter, Layer, config_of
from bitpolicy.policies.exporters.requantize import TargetError
from bitpolicy.policies.target import Target

_SHOWN = 2  # groups named in a refusal


def tied_layers(exporter: Exporter, target: Target) -> list[list[str]]:
    """Groups of layers that must have one format, by their names in the target.

    Raises:
        BitPolicyError: the program does not know this class of model.
    """
    return [
        [f"{target.prefix(component)}{name}" for name in group]
        for component, model in target.items()
        for group in exporter.tied(config_of(model), [name for name, _ in quantizable_layers(model)])
    ]


def apart(groups: Sequence[Sequence[str]], layers: Mapping[str, Layer]) -> list[Sequence[str]]:
    """The groups whose layers differ in format."""
    return [group for group in groups if len({layers[name].format for name in group}) > 1]


def refuse_apart(exporter: Exporter, groups: Sequence[Sequence[str]], layers: Mapping[str, Layer]) -> None:
    """Report layers that a target stores as one and a policy stores apart, with the remedies.

    Raises:
        TargetError: always, if there are any.
    """
    differing = apart(groups, layers)
    if not differing:
        return
    shown = "; ".join(
        ", ".join(f"{name} in {layers[name].format.name}" for name in group) for group in differing[:_SHOWN]
    )
    raise TargetError(
        f"{exporter.title} stores {len(differing)} group{'s' * (len(differing) > 1)} of layers as one layer each, and "
        f"the policy gives them different formats: {shown}{'; ...' * (len(differing) > _SHOWN)}. Give each group one "
        f"format, in the policy or with --requantize, or search again with --target {exporter.name}"
    )


def common(exporter: Exporter, layers: Sequence[Layer]) -> Format:
    """The widest format that one of the layers has and the target holds for all of them."""
    candidates = dict.fromkeys([layer.format for layer in layers])
    held = [f for f in candidates if all(f.fits(x.shape) and exporter.holds(x.stored_as(f)) for x in layers)]
    return max(held, key=lambda format: int(format.parameters()["bits"]), default=FP16)
