"""The heat map: error by layer and sampling step, with the role and stage of each layer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

from bitpolicy.report.drawing import FAINT, INK, RULE, Picture, picture, step_ticks
from bitpolicy.report.groups import running_order
from bitpolicy.report.inputs import Probed
from bitpolicy.report.steps import by_step
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.probes.error_split import ErrorSplit

_TALLEST, _ROW = 24.0, 0.125  # inches: all rows at most, and one row if there is room
_NAMED = 0.11  # rows of this height show the layer's name; lower ones show the name of their block
_TOP, _BOTTOM, _GAP = 1.45, 0.95, 0.12
_STAGES, _BAND, _ROLE, _MAP = 0.95, 0.1, 0.14, 2.3
_LETTER = 0.0505  # inches of one letter of a name
_LONGEST = 64  # letters
_LINE = 0.115  # inches that a block's name takes
_BANDS = {"encoder": "#77AADD", "early": "#77AADD", "middle": "#EEDD88", "decoder": "#EE8866", "late": "#EE8866"}
_BANDS |= {"conditioning": "#44BB99", "autoencoder": "#FFAABB"}
_SPAN = 1e-8  # the faintest colour is this fraction of the strongest, or the first percentile


def heat_map(probed: Probed, split: ErrorSplit) -> Picture:
    """Error that enters at each step, for every layer in every packed format."""
    order = running_order(probed.layers)
    layers = [probed.layers[place] for place in order]
    values = by_step(probed, split)
    maps = [values[:, order, probed.column(f)].double().numpy().T for f in probed.formats]
    height = min(_ROW, _TALLEST / len(layers)) * len(layers)
    labels = _labels(layers, height / len(layers))
    names = 0.1 + _LETTER * max(len(label) for _, label in labels)
    roles = list(dict.fromkeys(layer.role for layer in layers))
    left = _STAGES + _BAND + names
    width = left + _ROLE * len(roles) + (_MAP + _GAP) * len(maps) + 0.25

    def draw(figure: Figure) -> None:
        def place(x: float, w: float) -> Axes:
            total = _TOP + height + _BOTTOM
            axes = figure.add_axes((x / width, _BOTTOM / total, w / width, height / total))
            axes.set_ylim(len(layers) - 0.5, -0.5)
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            return axes

        _draw_stages(place(_STAGES, _BAND), layers, height)
        role_axes = place(left, _ROLE * len(roles))
        _draw_roles(role_axes, layers, roles)
        role_axes.set_yticks([at for at, _ in labels], [label for _, label in labels], fontsize=6.5)
        role_axes.tick_params(axis="y", length=0, pad=3)
        first = left + _ROLE * len(roles) + _GAP
        axes = [place(first + i * (_MAP + _GAP), _MAP) for i in range(len(maps))]
        titles = [f.name for f in probed.formats]
        _draw_maps(figure, axes, maps, titles, layers, (width, _TOP + height + _BOTTOM), probed.lead)

    steps = maps[0].shape[1] - probed.lead
    alt = (
        f"Heat map of {len(layers)} layers by {steps} sampling steps, one panel for each of "
        f"{', '.join(f.name for f in probed.formats)}; darker means that more error enters there."
    )
    return picture("heat-map", alt, draw, width, _TOP + height + _BOTTOM)


def _labels(layers: Sequence[Layer], row: float) -> list[tuple[float, str]]:
    """Position and text of the names: one for every layer, or one per block, skipping those that would overlap."""
    if row >= _NAMED:
        return [(float(i), _short(layer.name)) for i, layer in enumerate(layers)]
    found: list[tuple[float, str]] = []
    start, free = 0, -np.inf
    for block, members in itertools.groupby(layers, key=lambda layer: _block(layer.name)):
        count = len(list(members))
        middle = start + (count - 1) / 2
        if (middle - free) * row >= _LINE:
            found.append((middle, _short(block)))
            free = middle
        start += count
    return found


def _block(name: str) -> str:
    """The name up to the second number: `down_blocks.1.attentions.0`; without numbers, up to the last dot."""
    found = re.match(r"(.*?\.\d+\..*?\.\d+|.*?\.\d+)(?=\.)", name)
    return found[1] if found else name.rpartition(".")[0] or name


def _short(name: str) -> str:
    half = _LONGEST // 2
    return name if len(name) <= _LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def _draw_stages(axes: Axes, layers: Sequence[Layer], height: float) -> None:
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    start, free = 0, -np.inf
    for stage, members in itertools.groupby(layers, key=lambda layer: layer.stage):
        count = len(list(members))
        middle = start + (count - 1) / 2
        axes.axhspan(start - 0.5, start + count - 0.5, color=_BANDS.get(stage, "#BBBBBB"), lw=0)
        if (middle - free) * height / len(layers) >= _LINE:
            axes.text(-0.6, middle, stage, ha="right", va="center", fontsize=8, fontweight="bold")
            free = middle
        start += count


def _draw_roles(axes: Axes, layers: Sequence[Layer], roles: Sequence[str]) -> None:
    """A mark in the column of each layer's role."""
    marks = np.zeros((len(layers), len(roles)))
    marks[np.arange(len(layers)), [roles.index(layer.role) for layer in layers]] = 1
    colors = ListedColormap(["#f4f4f4", "#555555"])
    axes.imshow(marks, aspect="auto", cmap=colors, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(roles)), roles, rotation=90, fontsize=7)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False, length=0, pad=2)
    for edge in range(len(roles) + 1):
        axes.axvline(edge - 0.5, color="white", lw=1.5)
    _draw_rules(axes, layers)


def _draw_maps(
    figure: Figure,
    axes: Sequence[Axes],
    maps: Sequence[np.ndarray],
    names: Sequence[str],
    layers: Sequence[Layer],
    size: tuple[float, float],
    lead: int,
) -> None:
    positive = np.concatenate([values[values > 0] for values in maps])
    high = float(positive.max()) if len(positive) else 1.0
    low = max(float(np.percentile(positive, 1)), _SPAN * high) if len(positive) else _SPAN
    norm = LogNorm(min(low, high / 100), high)
    image = None
    for one, values, name in zip(axes, maps, names, strict=True):
        one.set_facecolor("white")
        shown = np.ma.masked_less_equal(values, 0)
        extent = (0.5 - lead, values.shape[1] - lead + 0.5, len(layers) - 0.5, -0.5)
        image = one.imshow(shown, aspect="auto", cmap="magma_r", norm=norm, interpolation="nearest", extent=extent)
        one.set_title(name, pad=22, fontweight="bold")
        one.set_xticks([*([0] if lead else []), *step_ticks(values.shape[1] - lead)])
        one.tick_params(axis="x", top=True, labeltop=True, labelsize=7.5, length=2)
        one.set_xlabel("sampling step", fontsize=8)
        _draw_rules(one, layers)
    first, last = axes[0].get_position(), axes[-1].get_position()
    bar = figure.add_axes((first.x0, 0.42 / size[1], last.x1 - first.x0, 0.1 / size[1]))
    assert image is not None
    figure.colorbar(image, cax=bar, orientation="horizontal", extend="min")
    bar.set_xlabel("error that enters at the step (relative power)", fontsize=8)
    bar.tick_params(labelsize=7.5)


def _draw_rules(axes: Axes, layers: Sequence[Layer]) -> None:
    """Draw a line between stages, and a fainter one between blocks."""
    for i, (before, after) in enumerate(itertools.pairwise(layers)):
        if before.stage != after.stage:
            axes.axhline(i + 0.5, color=INK, lw=0.8)
        elif _block(before.name) != _block(after.name):
            axes.axhline(i + 0.5, color=RULE if len(layers) > 200 else FAINT, lw=0.3)
