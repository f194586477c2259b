"""`bitpolicy inspect`: layers, roles, bytes and formats of a model, a policy or a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from bitpolicy.cli.options import (
    RUN,
    Call,
    Component,
    Debug,
    Device,
    Dtype,
    Json,
    Prompts,
    Revision,
    Variant,
)
from bitpolicy.command import importing

What = Annotated[
    str | None,
    typer.Argument(help="Hub id, pipeline folder, checkpoint folder or policy.yaml. Default: the bundled pipeline."),
]


Kernels = Annotated[
    bool,
    typer.Option(
        "--kernels", help="Draw once with a checkpoint, and list which kernel each packed layer gets, and why."
    ),
]
Compute = Annotated[
    str | None,
    typer.Option(
        help="With --kernels: exact, float, int8 or fp8 instead of what the checkpoint says.", rich_help_panel=RUN
    ),
]
LowMemory = Annotated[
    bool,
    typer.Option("--low-memory", help="With --kernels: kernels keep no layouts of their own.", rich_help_panel=RUN),
]


def inspect(
    what: What = None,
    component: Component = None,
    kernels: Kernels = False,
    compute: Compute = None,
    low_memory: LowMemory = False,
    prompts: Prompts = None,
    call: Call = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    variant: Variant = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List every layer with its role, stage, shape, format and bytes; or with --kernels, how it is multiplied."""
    options = locals()
    with importing(options):
        from bitpolicy.cli.running.inspect import run
    run(**options)
