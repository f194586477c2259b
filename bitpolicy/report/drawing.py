"""How every picture looks, and how it is encoded to the same bytes each time.

Colour-blind readers can tell the colours apart: formats have Okabe and Ito's (2008), the parts of an error Tol's
(2021).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

INK, FAINT, RULE = "#222222", "#6b6b6b", "#d9d9d9"
FORMAT_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")  # smallest format first
PART_COLORS = {"bias": "#332288", "scale": "#DDCC77", "noise": "#88CCEE"}
_STAGE_STYLES = {
    "encoder": ("#332288", "-"),
    "early": ("#332288", "-"),
    "inside": ("#88CCEE", "--"),
    "middle": ("#CC6677", "--"),
    "decoder": ("#117733", "-."),
    "late": ("#117733", "-."),
}
_DPI = 110
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so letters are the same on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "path.simplify": False,
}


@dataclass(frozen=True)
class Picture:
    """One picture of the report.

    Attributes:
        name: file name without the extension.
        png: content of the file.
        alt: description for readers who cannot see it.
    """

    name: str
    png: bytes
    alt: str


def picture(name: str, alt: str, draw: Callable[[Figure], None], width: float, height: float) -> Picture:
    """A picture of `width` x `height` inches that `draw` fills, as a PNG with 256 colours and no metadata."""
    style: dict[Any, Any] = {**dict(matplotlib.rcParamsDefault), **_STYLE}  # independent of the user's own style
    style.pop("backend", None)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), dpi=_DPI)
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    out = io.BytesIO()
    drawn.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return Picture(name, out.getvalue(), alt)


def format_color(place: int) -> str:
    """The colour of the format at `place`, smallest first."""
    return FORMAT_COLORS[place % len(FORMAT_COLORS)]


def stage_style(group: str) -> tuple[str, str]:
    """Colour and dashes of a stage, or of the part of a stage that the group's last word names."""
    default = ("#DDAA33", ":")
    return _STAGE_STYLES.get(group.split()[-1], _STAGE_STYLES.get(group.split(",")[0], default))


def log_limits(values: Sequence[np.ndarray], room: float = 1.6) -> tuple[float, float]:
    """Limits of a log axis that contain every positive value; whole decades if the values are close together."""
    flat = np.concatenate([np.asarray(v, float).ravel() for v in values])
    flat = flat[np.isfinite(flat) & (flat > 0)]
    if not len(flat):
        return 0.1, 1.0
    low, high = float(flat.min()) / room, float(flat.max()) * room
    if high / low < 100:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
    return (low, high) if high / low > 10 else (low / 10, high)


def step_axis(axes: Axes, steps: int) -> None:
    """Label the axis with sampling steps, counted from 1."""
    axes.set_xlabel("sampling step (first: noise, last: image)")
    axes.set_xticks(step_ticks(steps))
    axes.set_xlim(0.5, steps + 0.5)


def step_ticks(steps: int) -> list[int]:
    """The first, the last, and round numbers between them that leave room for their labels."""
    stride = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if steps / s <= 8 or s == 1000)
    between = [s for s in range(stride, steps, stride) if s > 1 and steps - s >= 0.6 * stride]
    return sorted({1, *between, steps})
