"""The policy map: the format of every layer, by block and role."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from bitpolicy.kernels.formats.format import Format
from bitpolicy.report.drawing import FAINT, INK, RULE, Picture, picture
from bitpolicy.report.groups import running_order
from bitpolicy.report.inputs import Probed
from bitpolicy.search.budget import readable
from bitpolicy.sensitivity.inventory import Layer

COLORS = {
    2: "#882255",
    3: "#CC79A7",
    4: "#D55E00",
    5: "#E69F00",
    6: "#009E73",
    7: "#56B4E9",
    8: "#0072B2",
    16: "#C4C4C4",
}
"""Colour of a bit width. As everywhere in the report, INT4 is orange and INT8 is blue."""
_CELL, _ROW, _TALLEST = 0.78, 0.26, 20.0  # inches: a role's column, a block's row if there is room, all rows
_ACROSS = 12  # most layers side by side in a cell
_RIGHT, _LETTER, _LEGEND = 1.55, 0.062, 0.2  # inches: space for the bytes, a letter, a row of the legend
_NAMED = 3  # formats per width that the legend names


@dataclass(frozen=True)
class _Map:
    """The content of the picture.

    Attributes:
        blocks: rows, in the order in which the sample passes them.
        roles: columns.
        cells: (block, role) -> the formats of the layers there.
        nbytes: block -> bytes as the policy stores its layers, and at FP16.
    """

    blocks: list[str]
    roles: list[str]
    cells: dict[tuple[str, str], list[Format]]
    nbytes: dict[str, tuple[int, int]]


def policy_map(probed: Probed, formats: Mapping[str, Format]) -> Picture:
    """Every layer as a strip, coloured by bit width, in the cell of its block and role.

    Args:
        formats: layer name -> its format in the policy.
    """
    shown = _mapped(probed, formats)
    row = min(_ROW, _TALLEST / len(shown.blocks))
    left = 0.2 + _LETTER * max(map(len, shown.blocks))
    width = left + _CELL * len(shown.roles) + _RIGHT
    labels = _labels(formats.values())
    columns = max(1, int(width / (0.6 + _LETTER * max(map(len, labels.values())))))
    bottom = 0.25 + _LEGEND * math.ceil(len(labels) / columns)
    height = 0.35 + 0.75 * _LETTER * max(map(len, shown.roles)) + row * len(shown.blocks) + bottom

    def draw(figure: Figure) -> None:
        across, down = _CELL * len(shown.roles), row * len(shown.blocks)
        axes = figure.add_axes((left / width, bottom / height, across / width, down / height))
        _draw_grid(axes, shown)
        for (block, role), here in shown.cells.items():
            _draw_cell(axes, shown.roles.index(role), shown.blocks.index(block), here)
        for place, block in enumerate(shown.blocks):
            text = " of ".join(readable(nbytes).partition(",")[0] for nbytes in shown.nbytes[block])
            axes.text(len(shown.roles) + 0.1, place + 0.5, text, va="center", fontsize=7, color=FAINT)
        handles = [Patch(color=COLORS[bits], label=label) for bits, label in labels.items()]
        figure.legend(handles=handles, loc="lower left", ncols=columns, bbox_to_anchor=(0.0, 0.0))

    counts: dict[str, int] = {}
    for format in formats.values():
        counts[format.name] = counts.get(format.name, 0) + 1
    alt = (
        f"A grid of {len(shown.blocks)} blocks by {len(shown.roles)} roles; in each cell its layers, coloured by "
        f"format: {', '.join(f'{count} {name}' for name, count in sorted(counts.items()))}."
    )
    return picture("policy-map", alt, draw, width, height)


def _mapped(probed: Probed, formats: Mapping[str, Format]) -> _Map:
    cells: dict[tuple[str, str], list[Format]] = {}
    nbytes: dict[str, tuple[int, int]] = {}
    layers: Sequence[Layer] = [probed.layers[place] for place in running_order(probed.layers)]
    for layer in layers:
        block, format = _block(layer.name), formats[layer.name]
        cells.setdefault((block, layer.role), []).append(format)
        ours, plain = nbytes.get(block, (0, 0))
        own = probed.account.shapes[layer.name]
        storage = probed.account.storage_dtype
        nbytes[block] = (ours + format.nbytes(own, storage), plain + math.prod(own) * storage.itemsize)
    roles = list(dict.fromkeys(layer.role for layer in layers))
    return _Map(list(nbytes), roles, cells, nbytes)


def _block(name: str) -> str:
    """The name up to its first number, `down_blocks.1`; without a number, its first part."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name.partition(".")[0]


def _draw_grid(axes: Axes, shown: _Map) -> None:
    axes.set_xlim(0, len(shown.roles))
    axes.set_ylim(len(shown.blocks), 0)
    axes.spines[:].set_visible(False)
    for place in range(len(shown.blocks) + 1):
        axes.axhline(place, color=RULE, lw=0.6)
    axes.set_xticks([i + 0.5 for i in range(len(shown.roles))], shown.roles, rotation=40, ha="left", fontsize=8)
    axes.set_yticks([i + 0.5 for i in range(len(shown.blocks))], shown.blocks, fontsize=7.5, color=INK)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, pad=3)


def _draw_cell(axes: Axes, column: int, row: int, formats: Sequence[Format]) -> None:
    """Draw the layers of a cell from left to right, in rows of equal length if there are many."""
    rows = math.ceil(len(formats) / _ACROSS)
    across = math.ceil(len(formats) / rows)
    wide, high = 0.94 / across, 0.84 / rows
    for i, format in enumerate(formats):
        corner = (column + 0.03 + i % across * wide, row + 0.08 + i // across * high)
        color = COLORS[bits_of(format)]
        axes.add_patch(Rectangle(corner, wide, high, facecolor=color, edgecolor="white", lw=0.5))


def bits_of(format: Format) -> int:
    """Whole bits per weight, without scales and zero points."""
    if not format.packed:
        return 16
    return int(format.parameters()["bits"])


def _labels(formats: Iterable[Format]) -> dict[int, str]:
    """Bit width -> the formats of that width, as text."""
    found: dict[int, dict[str, None]] = {}
    for format in formats:
        found.setdefault(bits_of(format), {})[format.name] = None
    labels = {}
    for bits in sorted(found):
        names = sorted(found[bits])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        labels[bits] = names[0] if len(names) == 1 else f"{bits} bits: {', '.join(names[:_NAMED])}{more}"
    return labels
