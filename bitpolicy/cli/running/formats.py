"""The implementation of `bitpolicy formats`."""

from __future__ import annotations

from collections.abc import Iterator

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import CONVROT, HARDWARE, all_formats
from bitpolicy.policies.exporters.exporter import Exporter, Layer
from bitpolicy.policies.exporters.targets import exporter_named

_WHERE = {
    "linear layers": Layer("", "Linear", (1024, 1024), all_formats()[-1]),
    "3x3 convolutions": Layer("", "Conv2d", (1024, 1024, 3, 3), all_formats()[-1]),
}
"""Layers whose shapes every group size divides. A target may hold fewer formats for other shapes."""


def run(target: str | None) -> None:
    """Print the formats: all of them, or those that a target can hold."""
    if target is None:
        print(",".join(format.name for format in _every()))
        return
    exporter = exporter_named(target)
    for where, layer in _WHERE.items():
        print(f"{where}: {','.join(format.name for format in _held(exporter, layer))}")
    print(f"suggested: --target {exporter.name} --formats {','.join(exporter.suggested)}")


def _held(exporter: Exporter, layer: Layer) -> Iterator[Format]:
    for format in _every():
        if format.fits(layer.shape) and exporter.holds(layer.stored_as(format)):
            yield format


def _every() -> tuple[Format, ...]:
    return (*CONVROT, *HARDWARE, *all_formats())
