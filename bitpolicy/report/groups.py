"""Layers by role, by stage and by what they write into, and the error of each group."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitpolicy.report.inputs import Probed
from bitpolicy.sensitivity.inventory import OUTSIDE, Layer

STAGES = ("conditioning", "encoder", "early", "middle", "decoder", "late", "ends", "autoencoder")
INTO_SKIPS, INSIDE = "encoder, into a skip", "encoder, inside"
# What a U-Net's encoder adds to the stream that its skips copy: the last layer of each resnet, its shortcut, the
# output projection of each attention, and the downsamplers.
_INTO_STREAM = re.compile(r"(conv2|conv_shortcut|proj_out|(down|up)samplers\.\d+\.conv)$")


@dataclass(frozen=True)
class Group:
    """A group of layers.

    Attributes:
        name: name of the group.
        members: indices of its layers in the table.
        total: sum of the layers' errors, float64, shape (F).
        median: median of the layers' errors, float64, shape (F).
        share: share of the error of all layers, float64, shape (F), in [0, 1]; 0 if there is no error.
        inputs: share of `total` that rounding inputs alone causes, float64, shape (F), in [0, 1]; None if no inputs are
            rounded, or the probe does not separate them.
        nbytes: bytes at FP16.
    """

    name: str
    members: tuple[int, ...]
    total: np.ndarray
    median: np.ndarray
    share: np.ndarray
    inputs: np.ndarray | None
    nbytes: int


def by_role(probed: Probed) -> list[Group]:
    """Groups by role, largest error first."""
    groups = _grouped(probed, lambda layer: layer.role)
    return sorted(groups, key=lambda g: -float(g.total.max()))


def by_stage(probed: Probed) -> list[Group]:
    """Groups by stage, in the order in which the sample passes them; the ends of the denoiser come after its blocks."""
    return sorted(_grouped(probed, lambda layer: layer.stage), key=lambda g: STAGES.index(g.name))


def by_path(probed: Probed) -> list[Group]:
    """For a U-Net: encoder layers that write into a skip, encoder layers inside the blocks, the middle and the
    decoder."""
    order = (INTO_SKIPS, INSIDE, "middle", "decoder")
    groups = {group.name: group for group in _grouped(probed, _path)}
    return [groups[name] for name in order if name in groups]


def _path(layer: Layer) -> str:
    if layer.role == "input_stem" and layer.stage not in OUTSIDE:
        return INTO_SKIPS
    if layer.stage != "encoder":
        return layer.stage
    return INTO_SKIPS if _INTO_STREAM.search(layer.name) else INSIDE


def _grouped(probed: Probed, key: Callable[[Layer], str]) -> list[Group]:
    members: dict[str, list[int]] = {}
    for place, layer in enumerate(probed.layers):
        members.setdefault(key(layer), []).append(place)
    return [_group(probed, name, places) for name, places in members.items()]


def _group(probed: Probed, name: str, members: Sequence[int]) -> Group:
    error = probed.table.error.double().numpy()
    of_group = error[list(members)]
    total = of_group.sum(0)
    share = total / np.maximum(error.sum(0), np.finfo(float).tiny)
    nbytes = sum(probed.layer_bytes(place) for place in members)
    return Group(name, tuple(members), total, np.median(of_group, 0), share, inputs_share(probed, members), nbytes)


def inputs_share(probed: Probed, members: Sequence[int]) -> np.ndarray | None:
    """Share of the summed error of the layers at `members` that rounding their inputs alone causes, shape (F)."""
    if probed.table.inputs is None:
        return None
    places = list(members)
    whole = probed.table.error.double().numpy()[places].sum(0)
    return np.minimum(probed.table.inputs.numpy()[places].sum(0) / np.maximum(whole, np.finfo(float).tiny), 1.0)


def running_order(layers: Sequence[Layer]) -> list[int]:
    """Indices of the layers, in the order in which the sample passes the stages. Models list their middle block last,
    or in between."""
    inside = [place for place, layer in enumerate(layers) if layer.stage not in ("ends", *OUTSIDE)]
    first = inside[0] if inside else len(layers)
    rank = {"conditioning": -1, "encoder": 1, "early": 1, "middle": 2, "decoder": 3, "late": 3, "autoencoder": 5}

    def key(place: int) -> int:
        return rank.get(layers[place].stage, 0 if place < first else 4)

    return sorted(range(len(layers)), key=key)
