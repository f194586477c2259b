"""`bitpolicy export`: a policy and a model make a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitpolicy.api import export as export_policy
from bitpolicy.cli.options import RUN, Debug, Device, Model, Revision, Variant
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.loading import load_source
from bitpolicy.policies.policy import Policy
from bitpolicy.search.budget import readable

PolicyFile = Annotated[
    Path, typer.Option(help="The policy.yaml; calibration.safetensors is read from beside it.", rich_help_panel=RUN)
]
OutputDir = Annotated[Path, typer.Option(help="The checkpoint folder to write.", rich_help_panel=RUN)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder.", rich_help_panel=RUN)]


def export(
    policy: PolicyFile,
    output_dir: OutputDir,
    model: Model = None,
    revision: Revision = None,
    variant: Variant = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write a packed checkpoint, a whole diffusers folder, from a policy file and the model it was made for."""
    loaded = Policy.load(policy)
    if output_dir.exists() and not overwrite and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise BitPolicyError(f"{output_dir} is there already; choose another --output-dir, or --overwrite it")
    source = load_source(model, loaded.model.component, device=device, revision=revision, variant=variant)
    nbytes = export_policy(source.pipe, policy, output_dir)
    print(
        f"{output_dir}: {nbytes:,} bytes in {source.component} ({readable(nbytes)}), "
        f"policy of {len(loaded.layers)} own entries"
    )
