"""`bitpolicy report`: what a probe found, as one HTML file and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bitpolicy.cli.options import Debug, Json
from bitpolicy.report.document import Report, make_report, require_free

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
    page = output or folder / "report.html"
    require_free(page, pictures)
    made = make_report(folder, budget)
    made.save(page, pictures)
    if as_json:
        print(json.dumps(_facts(made, page, pictures), allow_nan=False))
        return
    for claim in made.claims:
        print(claim)
    if made.lists is not None:
        never, free, small = made.lists.never, made.lists.free, made.lists.small.name.upper()
        print(f"at {made.lists.budget}: {len(never)} layers are never {small}, {len(free)} are free at {small}")
    print(f"{page} has the report{'' if pictures is None else f', {pictures} its pictures'}")


def _facts(made: Report, page: Path, pictures: Path | None) -> dict[str, object]:
    found: dict[str, object] = {
        "report": str(page),
        "pictures": [] if pictures is None else [str(pictures / f"{p.name}.png") for p in made.pictures],
        "claims": {claim.what: claim.holds for claim in made.claims},
    }
    if made.lists is not None:
        found["budget_bytes"] = made.lists.budget.nbytes
        found["never"] = [m.layer.name for m in made.lists.never]
        found["free"] = [m.layer.name for m in made.lists.free]
    return found
