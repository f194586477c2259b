"""From the fields of dataclasses to the options of a command, and the options that only commands have."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from bitpolicy import __version__
from bitpolicy.declared import Declared, Option, declared_options
from bitpolicy.kernels.errors import BitPolicyError

RUN = "Run"


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What every pipeline call is given, as the command line writes it."""

    group: ClassVar = "Pipeline call"

    prompts: Annotated[
        Path | None,
        Option(
            "Text file with one prompt a line, or .jsonl file with the arguments of one call a line. Default: a "
            "built-in list."
        ),
    ] = None
    num_inference_steps: Annotated[int | None, Option("Sampling steps. Default: 20.", least=1)] = None
    guidance_scale: Annotated[float | None, Option("Classifier-free guidance. Default: the pipeline's own.")] = None
    call: Annotated[
        list[str] | None,
        Option(
            "Any other argument of the pipeline call, e.g. --call height=512 --call num_frames=8. May be repeated.",
            metavar="NAME=VALUE",
        ),
    ] = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline call that were given.

        Raises:
            BitPolicyError: one of `call` is not NAME=VALUE, or a number is not finite.
        """
        named = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        given = {name: value for name, value in named.items() if value is not None}
        call = {**given, **dict(map(_named_value, self.call or ()))}  # null included, which is not every default
        for name, value in call.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise BitPolicyError(f"{name} is {value}; give a number")
        return call


@dataclass(frozen=True, kw_only=True)
class PrintOptions:
    """What a command prints."""

    group: ClassVar = RUN

    as_json: Annotated[bool, Option("Print one JSON object on stdout and nothing else.", name="json")] = False
    debug: Annotated[  # `bitpolicy.cli.main` looks for it before any command runs
        bool, Option("Show the traceback of an error, and other libraries' messages.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class ProgressOptions(PrintOptions):
    """What a command prints that takes its time."""

    quiet: Annotated[bool, Option("Show no progress bars.")] = False


def _print_version(asked: bool) -> None:
    if asked:
        print(f"bitpolicy {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
]
_VERSION = inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Version)


_LAST = {field.name for field in fields(ProgressOptions)}


def takes(
    *kinds: type, without: Collection[str] = (), version: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose options are the fields of these dataclasses; its function takes them all as keywords.

    Args:
        kinds: dataclasses whose fields are annotated with an `Option`; of two fields of one name the later one counts.
        without: fields that the command does not have.
        version: whether `--version` is one of its options.
    """
    declared = {one.name: one for kind in kinds for one in declared_options(kind) if not one.option.only_python}
    in_order = sorted(declared.values(), key=lambda one: one.name in _LAST)
    found = [_parameter(one) for one in in_order if one.name not in without]

    def decorated(function: Callable[..., None]) -> Callable[..., None]:
        parameters = [*found, _VERSION] if version else found
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return function

    return decorated


def _parameter(declared: Declared) -> inspect.Parameter:
    option = declared.option
    kind = str if declared.choices else declared.kind if option.typed is None else option.typed
    default = inspect.Parameter.empty if declared.default is MISSING else declared.default
    if isinstance(default, tuple):
        default = ",".join(default) if kind is str else None
    about: Any = typer.Argument(help=option.help) if option.positional else _option(declared)
    return inspect.Parameter(
        declared.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, about]
    )


def _option(declared: Declared) -> Any:
    option = declared.option
    name = f"--{declared.keyword.replace('_', '-')}"
    switch = f"{name}/--no-{name[2:]}" if declared.is_flag and declared.default else name
    return typer.Option(
        switch,
        help=option.help,
        callback=declared.checked,  # at once, before anything heavy is imported
        metavar=option.metavar,
        rich_help_panel=declared.group,
    )


def _named_value(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is JSON where it reads as such (8, 0.5, true, [1, 2]), else the text itself."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise BitPolicyError(f"--call {text!r} is not NAME=VALUE; write for example --call height=512")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
