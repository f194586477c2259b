"""A command that refuses empty values: `--output-dir ''` would mean the current folder, and `--model ''` no model."""

from __future__ import annotations

from typing import Any

import typer
from typer import rich_utils
from typer.core import TyperCommand

rich_utils.REQUIRED_SHORT_STRING = ""  # otherwise an asterisk precedes what is already marked [required]


class Command(TyperCommand):
    """A command whose options and arguments must not be empty."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        params: list[Any] = self.get_params(ctx)
        for param in params:
            value = given.get(str(param.name))
            if value == "" or (isinstance(value, list | tuple) and "" in value):
                leave = "" if param.required else ", or leave it out"
                raise typer.BadParameter(f"it is empty; give a value{leave}", ctx=ctx, param=param)
        return super().parse_args(ctx, args)
