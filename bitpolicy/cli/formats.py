"""`bitpolicy formats`: the formats there are, and which of them another program can hold."""

from __future__ import annotations

from typing import Annotated

import typer

from bitpolicy.cli.options import RUN, Debug
from bitpolicy.command import importing
from bitpolicy.policies.exporters.names import NAMES

Target = Annotated[
    str | None, typer.Option(help=f"Only those that a program can hold: {', '.join(NAMES)}.", rich_help_panel=RUN)
]


def formats(target: Target = None, debug: Debug = False) -> None:
    """List the formats there are, or those that another program can hold, as `--formats` takes them."""
    with importing({"debug": debug}):
        from bitpolicy.cli.running.formats import run
    run(target)
