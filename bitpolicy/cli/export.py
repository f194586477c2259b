"""`bitpolicy export`: a policy and a model make a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitpolicy.api import export as export_policy
from bitpolicy.cli.options import RUN, Config, Debug, Model, Revision, Variant
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.loading import BUNDLED
from bitpolicy.policies.policy import Policy
from bitpolicy.search.budget import read, readable

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


def export(
    policy: PolicyFile,
    output_dir: OutputDir,
    model: Model = None,
    revision: Revision = None,
    variant: Variant = None,
    config: Config = None,
    max_shard_size: ShardSize = "10GB",
    push_to_hub: PushToHub = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write a packed checkpoint, a whole diffusers folder, from a policy file and the model it was made for.

    The model is not loaded: weights are read from its safetensors, quantized and written one layer at a time, so that
    memory does not grow with the model. Same input, same bytes. A stopped export leaves the folder as it was.
    """
    loaded = Policy.load(policy)
    shard = _shard_bytes(max_shard_size)
    if output_dir.exists() and not overwrite and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise BitPolicyError(f"{output_dir} is there already; choose another --output-dir, or --overwrite it")
    nbytes = export_policy(
        model or BUNDLED,
        policy,
        output_dir,
        max_shard_size=shard,
        revision=revision,
        variant=variant,
        config=config,
        push_to_hub=push_to_hub,
    )
    print(
        f"{output_dir}: {nbytes:,} bytes in {loaded.model.component} ({readable(nbytes)}), "
        f"policy of {len(loaded.layers)} own entries"
    )
    if push_to_hub:
        print(f"pushed to https://huggingface.co/{push_to_hub}")


def _shard_bytes(text: str) -> int:
    amount, unit = read(text)
    if unit != "B" or amount < 1:
        raise BitPolicyError(f"--max-shard-size {text}: write a size in bytes, such as 10GB")
    return int(amount)
