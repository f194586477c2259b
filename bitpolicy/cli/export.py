"""`bitpolicy export`: a policy and a model make a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitpolicy.cli.options import RUN, Config, Debug, Json, Model, Revision, Variant
from bitpolicy.command import importing
from bitpolicy.policies.exporters.names import NAMES

PolicyFile = Annotated[
    Path, typer.Option(help="The policy.yaml; calibration.safetensors is read from beside it.", rich_help_panel=RUN)
]
OutputDir = Annotated[Path, typer.Option(help="The checkpoint folder to write.", rich_help_panel=RUN)]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the folder, once the new one is complete.", rich_help_panel=RUN),
]
ShardSize = Annotated[
    str,
    typer.Option("--max-shard-size", help="A larger denoiser is split into files of this size.", rich_help_panel=RUN),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME",
        help="Upload the folder to this model repository; takes a token (`hf auth login`).",
        rich_help_panel=RUN,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(help=f"Write another program's files: {', '.join(NAMES)}. Default: a pipeline.", rich_help_panel=RUN),
]
Compute = Annotated[
    str | None,
    typer.Option(
        help="Record another compute than the policy's, exact, int8 or fp8: what packed layers multiply with once the "
        "checkpoint is loaded. int8 also rounds inputs to 8 bits: faster on CPUs with VNNI and on GPUs, for some "
        "accuracy, which `bitpolicy eval` measures; fp8 those of fp8 layers to float8.",
        rich_help_panel=RUN,
    ),
]
Requantize = Annotated[
    bool,
    typer.Option("--requantize", help="Round layers anew whose format the target does not have.", rich_help_panel=RUN),
]


def export(
    policy: PolicyFile,
    output_dir: OutputDir,
    model: Model = None,
    revision: Revision = None,
    variant: Variant = None,
    config: Config = None,
    max_shard_size: ShardSize = "10GB",
    push_to_hub: PushToHub = None,
    target: Target = None,
    requantize: Requantize = False,
    compute: Compute = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a packed checkpoint, a whole diffusers folder, from a policy file and the model it was made for.

    The model is not loaded: weights are read from its safetensors, quantized and written one layer at a time, so that
    memory does not grow with the model. Same input, same bytes. A stopped export leaves the folder as it was.
    """
    options = locals()
    with importing(options):
        from bitpolicy.cli.running.export import run
    run(**options)
