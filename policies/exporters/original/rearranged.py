"""A source in the layout of the model's original checkpoint: tensors renamed, merged and swapped.

The first dimension of a stored tensor counts output channels. Codes, scales, zero points, FP16 weights and biases are
therefore all rearranged in the same way, and nothing is rounded. The scale of a whole tensor stays as it is; no merged
layer has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.exporters.exporter import Layer, Source
from bitpolicy.policies.exporters.original.families import layout_of
from bitpolicy.policies.exporters.original.layout import Place

_WEIGHT = ".weight"


def in_original_layout(source: Source) -> Source:
    """The same tensors where the original checkpoint has them. Layers that it merges have one format.

    Raises:
        BitPolicyError: the layout of this class is unknown, or it has no place for a tensor.
    """
    layout = layout_of(source.config)
    places = layout.places(dict.fromkeys(_names(source)))
    marks = {name: torch.zeros(1, dtype=source.storage) for key, name in layout.marks.items() if source.config.get(key)}
    layers = [_merged(source.layers, places[f"{name}{_WEIGHT}"]) for name in source.layers]
    others = {places[name].name: _joined(source.others, places[name]) for name in source.others}
    return replace(
        source,
        layers={layer.name: layer for layer in layers},
        others=others | {name: TensorSpec.stored(mark, source.storage) for name, mark in marks.items()},
        tensors=partial(_rearranged, source, places, marks),
    )


def _names(source: Source) -> Iterator[str]:
    """Every tensor: the original ones, and those of packed layers."""
    yield from source.others
    for name, layer in source.layers.items():
        yield f"{name}{_WEIGHT}"
        if layer.format.packed:
            yield from (f"{name}.{suffix}" for suffix in layer.format.tensors(layer.shape, source.storage))


def _merged(layers: Mapping[str, Layer], place: Place) -> Layer:
    parts = [layers[part.removesuffix(_WEIGHT)] for part in place.parts]
    rows = sum(part.shape[0] for part in parts)
    return replace(parts[0], name=place.name.removesuffix(_WEIGHT), shape=(rows, *parts[0].shape[1:]))


def _joined(specs: Mapping[str, TensorSpec], place: Place) -> TensorSpec:
    parts = [specs[part] for part in place.parts]
    if len(parts) == 1:
        return parts[0]
    return TensorSpec(parts[0].dtype, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]))


def _rearranged(
    source: Source, places: Mapping[str, Place], marks: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in its place; the parts of a merged tensor wait for each other."""
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in source.tensors():
        place = places[name]
        rows = torch.cat(tensor.chunk(2)[::-1]) if place.swapped and tensor.ndim else tensor
        if len(place.parts) == 1:
            yield place.name, rows
            continue
        found = waiting.setdefault(place.name, {})
        found[name] = rows
        if len(found) == len(place.parts):
            del waiting[place.name]
            yield place.name, torch.cat([found[part] for part in place.parts])
    yield from marks.items()
