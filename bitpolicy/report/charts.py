"""The report's charts: agreement, groups, shares, amplification, skips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bitpolicy.check import TRUSTED_DB, Check
from bitpolicy.report.drawing import (
    FAINT,
    INK,
    PART_COLORS,
    Picture,
    format_color,
    log_limits,
    picture,
    stage_style,
    step_axis,
)
from bitpolicy.report.groups import Group, by_path, by_role, by_stage
from bitpolicy.report.inputs import Probed
from bitpolicy.report.shares import AS_IT_WAS, CORRECTED, Shares, shares_by_role
from bitpolicy.report.steps import amplification, entering, local_error
from bitpolicy.sensitivity.inventory import OUTSIDE
from bitpolicy.sensitivity.probes.error_split import ErrorSplit


def agreement(probed: Probed, check: Check) -> Picture:
    """Predicted against measured error: one panel per format, and one for random policies."""
    predicted, measured = np.asarray(check.predicted), np.asarray(check.measured)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(probed.formats) + 1, squeeze=False)[0]
        for i, format in enumerate(probed.formats):
            column = probed.column(format)
            points = [(measured[:, column], predicted[:, column], "o", format_color(i), "one layer")]
            _scatter(panels[i], f"{format.name}, one layer at a time", points)
        _scatter(panels[-1], "random policies", _policy_points(check))
        panels[-1].legend(loc="lower right", handletextpad=0.2)
        figure.tight_layout(w_pad=2)

    alt = (
        "Scatter plots of predicted against measured error on logarithmic axes, one for each format over "
        f"{len(check.layers)} layers and one over {len(check.policies) - 1} random policies, with the diagonal."
    )
    return picture("agreement", alt, draw, 3.4 * (len(probed.formats) + 1), 3.6)


_Points = tuple[np.ndarray, np.ndarray, str, str, str]  # measured, predicted, marker, colour, label


def _policy_points(check: Check) -> list[_Points]:
    """Points of the random policies, with layers' errors added as vectors and as powers. Policies beyond prediction are
    separate."""
    trusted = [p for p in check.policies[1:] if p.psnr_db is not None and p.psnr_db > TRUSTED_DB]
    others = [p for p in check.policies[1:] if p not in trusted]
    found = [
        ([(p.measured, p.predicted) for p in trusted], "D", "#DDAA33", "added as vectors"),
        ([(p.measured, p.additive) for p in trusted], "o", "#004488", "added as powers"),
        ([(p.measured, p.additive) for p in others], "x", "#BB5566", "other images, as powers"),
    ]
    return [(*np.array(pairs).T, marker, color, label) for pairs, marker, color, label in found if pairs]


def _scatter(axes: Axes, title: str, points: Sequence[_Points]) -> None:
    low, high = log_limits([values for measured, predicted, *_ in points for values in (measured, predicted)])
    ends = np.array([low, high])
    axes.plot(ends, ends, color=INK, lw=0.9)
    for factor in (0.5, 2.0):
        axes.plot(ends, factor * ends, color=FAINT, lw=0.7, ls=(0, (4, 3)))
    for measured, predicted, marker, color, label in points:
        axes.plot(measured, predicted, marker, color=color, ms=3.5, mew=0.8, alpha=0.65, ls="none", label=label)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=title)
    axes.set(xlabel="measured error", ylabel="predicted error", aspect="equal")


def by_group(probed: Probed) -> Picture:
    """Sum and median of the layers' errors, by role and by stage."""
    roles, stages = by_role(probed), by_stage(probed)
    rows = len(roles) + len(stages)
    height = 1.3 + 0.19 * len(probed.formats) * rows + 0.1 * rows

    def draw(figure: Figure) -> None:
        ratios = [len(roles), len(stages)]
        panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=ratios, squeeze=False)
        both = [values for g in (*roles, *stages) for values in (g.total, g.median)]
        panels[0, 0].set(xlim=log_limits(both), xscale="log")
        for row, groups in enumerate((roles, stages)):
            _bars(panels[row, 0], groups, [g.total for g in groups], probed)
            _bars(panels[row, 1], groups, [g.median for g in groups], probed)
        panels[0, 0].set_title("sum over the layers")
        panels[0, 1].set_title("median layer")
        for axes in panels[1]:
            axes.set_xlabel(f"error of the {probed.measure} (relative power)")
        panels[0, 1].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(probed.formats), borderaxespad=0.2)
        figure.tight_layout(h_pad=1.2, w_pad=2)

    names = ", ".join(f"{g.name} {g.total[probed.column(probed.formats[0])]:.1e}" for g in roles[:3])
    alt = f"Bars of error by role and by stage; largest sums in {probed.formats[0].name}: {names}."
    return picture("roles", alt, draw, 9.6, height)


def _bars(axes: Axes, groups: Sequence[Group], values: Sequence[np.ndarray], probed: Probed) -> None:
    thick = 0.8 / len(probed.formats)
    for i, format in enumerate(probed.formats):
        lengths = [float(v[probed.column(format)]) for v in values]
        places = np.arange(len(groups)) - 0.4 + thick * (i + 0.5)
        axes.barh(places, lengths, thick * 0.92, color=format_color(i), label=format.name)
    axes.set_yticks(range(len(groups)), [f"{g.name} ({len(g.members)})" for g in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def composition(probed: Probed, split: ErrorSplit) -> Picture:
    """Shares of bias, scale and noise by role, for every format, without and with bias correction."""
    kinds = ((AS_IT_WAS, "bias uncorrected"), (CORRECTED, "bias corrected"))
    found = [
        [shares_by_role(probed, split, corrected, probed.column(f)) for f in probed.formats] for corrected, _ in kinds
    ]
    rows = len(found[0][0])

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, len(probed.formats), sharex=True, sharey=True, squeeze=False)
        for row, (_, label) in enumerate(kinds):
            for column, format in enumerate(probed.formats):
                _stack(panels[row, column], found[row][column])
                panels[row, column].set_title(f"{format.name}, {label}")
        panels[0, 0].set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], ylim=(rows - 0.5, -0.5))
        panels[0, 0].set_xticklabels(["0", "25%", "50%", "75%", "100%"])
        for axes in panels[1]:
            axes.set_xlabel("share of the role's summed error")
        for axes in panels[:, 0]:
            axes.get_yticklabels()[0].set_fontweight("bold")
        handles = panels[0, 0].get_legend_handles_labels()
        figure.tight_layout(h_pad=1.2, rect=(0, 0, 1, 1 - 0.3 / (1.5 + 0.46 * rows)))
        figure.legend(*handles, loc="upper right", ncols=3, borderaxespad=0.4)

    first, last = (found[0][i]["all layers"] for i in (0, -1))
    alt = (
        "Stacked bars of bias, scale and noise by role. All layers, bias uncorrected: "
        f"{probed.formats[0].name} {first}; {probed.formats[-1].name} {last}."
    )
    return picture("shares", alt, draw, 2.2 + 3.7 * len(probed.formats), 1.5 + 0.46 * rows)


def _stack(axes: Axes, by_role: Mapping[str, Shares]) -> None:
    start = np.zeros(len(by_role))
    for i, (part, color) in enumerate(PART_COLORS.items()):
        lengths = np.array([s.parts[i] for s in by_role.values()])
        axes.barh(range(len(by_role)), lengths, 0.78, left=start, color=color, label=part, ec="white", lw=0.5)
        start += lengths
    axes.set_yticks(range(len(by_role)), list(by_role))
    axes.axhline(0.5, color=FAINT, lw=0.8)
    axes.axvline(0.5, color=INK, lw=0.7, ls=(0, (4, 3)))
    axes.tick_params(axis="y", length=0)


def through_the_sampler(probed: Probed, split: ErrorSplit) -> Picture:
    """Amplification by step and stage, and the error that enters at each step, by stage."""
    stages = [stage for stage in by_stage(probed) if stage.name not in OUTSIDE]
    small = probed.formats[0]
    column = probed.column(small)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 3, squeeze=False)[0]
        for i, format in enumerate(probed.formats):
            values = amplification(probed, split, probed.column(format))
            _line(panels[0], values, format_color(i), "--" if i else "-", format.name)
        panels[0].legend(loc="upper left", handlelength=2.6)
        _finish(panels[0], "amplification, median layer", "|dx$_0$| / |de$_t$|")
        lines = [amplification(probed, split, column, stage) for stage in stages]
        _stage_lines(panels[1], stages, lines, f"amplification by stage, {small.name}", "|dx$_0$| / |de$_t$|")
        lines = [entering(probed, split, column, stage) for stage in stages]
        _stage_lines(panels[2], stages, lines, f"error entering, {small.name}", "relative power, sum over layers")
        _legend_below(figure, panels[2], 2 / 3, 3.5)

    alt = (
        "Lines over sampling steps: amplification of an error from its step to the final latent, for the median layer "
        f"and by stage; and the error that enters at each step in {small.name}, by stage."
    )
    return picture("steps", alt, draw, 11.65, 3.5)


def skips(probed: Probed, split: ErrorSplit) -> Picture:
    """For a U-Net: errors of encoder layers that write into a skip, compared with those of other layers."""
    groups = by_path(probed)
    error = probed.table.error.double().numpy()
    small = probed.formats[0]
    column = probed.column(small)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 3, squeeze=False)[0]
        panels[0].set(xlim=log_limits([error]), xscale="log")
        thick = 0.8 / len(probed.formats)
        for i, format in enumerate(probed.formats):
            places = np.arange(len(groups)) - 0.4 + thick * (i + 0.5)
            values = [error[list(g.members), probed.column(format)] for g in groups]
            _spread(panels[0], places, values, format_color(i), format.name)
        panels[0].set_yticks(range(len(groups)), [f"{g.name} ({len(g.members)})" for g in groups])
        panels[0].set(ylim=(len(groups) - 0.5, -0.5), title="each layer; line: median")
        panels[0].set_xlabel(f"error of the {probed.measure}")
        panels[0].tick_params(axis="y", length=0)
        panels[0].legend(loc="upper left", handletextpad=0.1, borderaxespad=0.1)
        lines = [entering(probed, split, column, g) / len(g.members) for g in groups]
        _stage_lines(panels[1], groups, lines, f"error entering, {small.name}", "relative power, mean layer")
        lines = [local_error(probed, split, column, g) for g in groups]
        title = f"error of the denoiser's output, {small.name}"
        _stage_lines(panels[2], groups, lines, title, "relative power, median layer")
        _legend_below(figure, panels[1], 0.68, 3.7)

    names = ", ".join(f"{g.name} {g.median[column]:.1e}" for g in groups)
    alt = f"Errors of layers by their place in the U-Net; medians in {small.name}: {names}."
    return picture("skips", alt, draw, 12.4, 3.7)


def _spread(axes: Axes, places: np.ndarray, values: Sequence[np.ndarray], color: str, label: str) -> None:
    """One dot per layer, spread out in a fixed pattern, and the median."""
    for i, (place, of_group) in enumerate(zip(places, values, strict=True)):
        offsets = (np.arange(len(of_group)) * 0.618 % 1 - 0.5) * 0.22
        shown = label if i == 0 else None
        axes.plot(of_group, place + offsets, "o", color=color, ms=2.6, alpha=0.5, mew=0, ls="none", label=shown)
        axes.plot([np.median(of_group)] * 2, [place - 0.17, place + 0.17], color=INK, lw=1.6)


def _stage_lines(axes: Axes, groups: Sequence[Group], lines: Sequence[np.ndarray], title: str, ylabel: str) -> None:
    for group, values in zip(groups, lines, strict=True):
        _line(axes, values, *stage_style(group.name), group.name)
    _finish(axes, title, ylabel)


def _line(axes: Axes, values: np.ndarray, color: str, dashes: str, label: str) -> None:
    marker = "o" if len(values) < 30 else None
    axes.plot(range(1, len(values) + 1), values, color=color, ls=dashes, label=label, lw=1.5, marker=marker, ms=2.5)


def _finish(axes: Axes, title: str, ylabel: str) -> None:
    limits = log_limits([np.asarray(line.get_ydata()) for line in axes.lines])
    axes.set(title=title, ylabel=ylabel, ylim=limits, yscale="log")
    step_axis(axes, len(axes.lines[0].get_xdata()))  # type: ignore[arg-type]
    axes.grid(axis="y")


def _legend_below(figure: Figure, axes: Axes, across: float, inches: float) -> None:
    """Place the legend of `axes` below the picture, in as many rows as it needs. Its centre is `across` of the way from
    left to right, or as close to that as fits."""
    lines, names = axes.get_legend_handles_labels()
    for columns in range(len(names), 0, -1):
        style = {"ncols": columns, "handlelength": 2.6, "borderaxespad": 0.3}
        legend = figure.legend(lines, names, loc="lower center", bbox_to_anchor=(across, 0.0), **style)
        half = legend.get_window_extent().width / figure.bbox.width / 2
        if half <= 0.5 or columns == 1:
            break
        legend.remove()
    legend.set_bbox_to_anchor((min(max(across, half), 1 - half), 0.0))
    height = legend.get_window_extent().height / figure.dpi
    figure.tight_layout(w_pad=2, rect=(0, (height + 0.05) / inches, 1, 1))
