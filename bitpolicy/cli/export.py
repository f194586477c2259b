"""`bitpolicy export`: a policy and a model make a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitpolicy.api import export as export_policy
from bitpolicy.api import export_for
from bitpolicy.cli.options import RUN, Debug, Device, Model, Revision, Variant
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.loading import load_source
from bitpolicy.policies.exporters.export import Exported
from bitpolicy.policies.exporters.targets import NAMES, exporter_named
from bitpolicy.policies.policy import Policy
from bitpolicy.search.budget import readable

PolicyFile = Annotated[
    Path, typer.Option(help="The policy.yaml; calibration.safetensors is read from beside it.", rich_help_panel=RUN)
]
OutputDir = Annotated[Path, typer.Option(help="The checkpoint folder to write.", rich_help_panel=RUN)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder.", rich_help_panel=RUN)]
Target = Annotated[
    str | None,
    typer.Option(help=f"Write another program's files: {', '.join(NAMES)}. Default: a pipeline.", rich_help_panel=RUN),
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
    device: Device = "auto",
    target: Target = None,
    requantize: Requantize = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write a packed checkpoint, a whole diffusers folder, from a policy file and the model it was made for."""
    loaded = Policy.load(policy)
    if target is not None:
        exporter_named(target)
    elif requantize:
        raise BitPolicyError("--requantize is for another program's formats; add --target, or leave it out")
    if output_dir.exists() and not overwrite and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise BitPolicyError(f"{output_dir} is there already; choose another --output-dir, or --overwrite it")
    source = load_source(model, loaded.model.component, device=device, revision=revision, variant=variant)
    if target is not None:
        _describe(export_for(source.pipe, policy, output_dir, target, requantize=requantize), output_dir, target)
        return
    nbytes = export_policy(source.pipe, policy, output_dir)
    print(
        f"{output_dir}: {nbytes:,} bytes in {source.component} ({readable(nbytes)}), "
        f"policy of {len(loaded.layers)} own entries"
    )


def _describe(exported: Exported, output_dir: Path, target: str) -> None:
    """Say what was written, what was rounded anew, and what was left behind."""
    size = f"{exported.nbytes:,} bytes of weights ({readable(exported.nbytes)})" if exported.nbytes else "a recipe"
    print(f"{output_dir}: {size} for {exporter_named(target).title}")
    if exported.requantized:
        print(f"{len(exported.requantized)} layers were rounded anew; weight error before and after, added:")
    for one in exported.requantized:
        errors = f"{one.error_before:7.3%} {one.error_after:7.3%} {one.error_after - one.error_before:+8.3%}"
        print(f"  {errors}  {one.name}: {one.before.format.name} -> {one.after.format.name}")
    for note in exported.notes:
        print(note)
