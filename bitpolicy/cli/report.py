"""`bitpolicy report`: what a probe found, as one HTML file and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitpolicy.cli.options import Debug, Json
from bitpolicy.command import importing

Folder = Annotated[
    Path, typer.Argument(help="What --output-dir was: of `bitpolicy probe --split --check`, or a search.")
]
Budget = Annotated[
    str | None,
    typer.Option(help="What the lists of layers to spare are for: 3GB, 45%, 4.5bit. Default: the policy's, or 45%."),
]
Output = Annotated[Path | None, typer.Option(help="The page. Default: report.html in the folder.")]
Pictures = Annotated[Path | None, typer.Option(help="A folder that gets the pictures as PNG files, and layers.csv.")]


def report(
    folder: Folder,
    budget: Budget = None,
    output: Output = None,
    pictures: Pictures = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw what a probe found: one HTML file that needs no network, and pictures.

    `bitpolicy probe --split --check --output-dir FOLDER` makes everything the report can show.
    """
    options = locals()
    with importing(options):
        from bitpolicy.cli.running.report import run
    run(**options)
