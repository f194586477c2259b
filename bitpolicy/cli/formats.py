"""`bitpolicy formats`: the formats there are, and which of them another program can hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from bitpolicy.cli.options import RUN, Debug
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import CONVROT, all_formats
from bitpolicy.policies.exporters.exporter import Exporter, Layer
from bitpolicy.policies.exporters.targets import NAMES, exporter_named

Target = Annotated[
    str | None, typer.Option(help=f"Only those that a program can hold: {', '.join(NAMES)}.", rich_help_panel=RUN)
]
_WHERE = {
    "linear layers": Layer("", "Linear", (1024, 1024), all_formats()[-1]),
    "3x3 convolutions": Layer("", "Conv2d", (1024, 1024, 3, 3), all_formats()[-1]),
}
"""Layers that every group divides; what a target holds of others may be less."""


def formats(target: Target = None, debug: Debug = False) -> None:
    """List the formats there are, or those that another program can hold, as `--formats` takes them."""
    if target is None:
        print(",".join(format.name for format in (*CONVROT, *all_formats())))
        return
    exporter = exporter_named(target)
    for where, layer in _WHERE.items():
        print(f"{where}: {','.join(format.name for format in _held(exporter, layer))}")
    print(f"suggested: --target {exporter.name} --formats {','.join(exporter.suggested)}")


def _held(exporter: Exporter, layer: Layer) -> Iterator[Format]:
    for format in (*CONVROT, *all_formats()):
        if format.fits(layer.shape) and exporter.holds(layer.stored_as(format)):
            yield format
