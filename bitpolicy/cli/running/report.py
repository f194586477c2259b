"""The implementation of `bitpolicy report`."""

from __future__ import annotations

import json
from pathlib import Path

from bitpolicy.cli.command_options import ReportOptions
from bitpolicy.report.document import Report, make_report, require_free


def run(options: ReportOptions) -> None:
    """Run the command with these options."""
    page = options.output or options.folder / "report.html"
    require_free(page, options.pictures)
    made = make_report(options.folder, options.budget)
    made.save(page, options.pictures)
    if options.as_json:
        print(json.dumps(_facts(made, page, options.pictures), allow_nan=False))
        return
    for claim in made.claims:
        print(claim)
    if made.lists is not None:
        never, free, small = made.lists.never, made.lists.free, made.lists.small.name.upper()
        print(f"at {made.lists.budget}: {len(never)} layers are never {small}, {len(free)} are free at {small}")
    print(f"{page} has the report{'' if options.pictures is None else f', {options.pictures} has its pictures'}")


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
