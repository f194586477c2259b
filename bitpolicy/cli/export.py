"""`bitpolicy export`: a policy and a model make a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitpolicy.api import export as export_policy
from bitpolicy.api import export_for
from bitpolicy.cli.options import RUN, Config, Debug, Json, Model, Revision, Variant
from bitpolicy.cli.report import print_json
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.loading import BUNDLED
from bitpolicy.policies.exporters.export import Exported
from bitpolicy.policies.exporters.targets import NAMES, exporter_named
from bitpolicy.policies.policy import Policy
from bitpolicy.search.budget import readable

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
    loaded = Policy.load(policy)
    if requantize and target is None:
        raise BitPolicyError("--requantize is for another program's formats; add --target, or leave it out")
    if target is not None and compute is not None:
        raise BitPolicyError("--compute is recorded in a pipeline of ours; leave out --target, or leave --compute out")
    if target is not None:
        exporter_named(target)
    if target is not None and push_to_hub is not None:
        raise BitPolicyError("--push-to-hub is for a whole pipeline; leave out --target, or upload the folder yourself")
    where: dict[str, Any] = {"revision": revision, "variant": variant, "config": config, "overwrite": overwrite}
    if target is not None:
        exported = export_for(model or BUNDLED, policy, output_dir, target, requantize=requantize, **where)
        if as_json:
            print_json({**_facts(exported), "target": target, "output_dir": str(output_dir)})
        else:
            _describe(exported, output_dir, target)
        return
    about: dict[str, Any] = {"max_shard_size": max_shard_size, "push_to_hub": push_to_hub, "compute": compute}
    nbytes = export_policy(model or BUNDLED, policy, output_dir, **about, **where)
    if as_json:
        found = {"bytes": nbytes, "component": loaded.model.component, "compute": compute or loaded.compute}
        print_json({**found, "pushed_to": push_to_hub, "output_dir": str(output_dir)})
        return
    print(
        f"{output_dir}: {nbytes:,} bytes in {loaded.model.component} ({readable(nbytes)}), "
        f"policy of {len(loaded.layers)} own entries"
    )
    if push_to_hub:
        print(f"pushed to https://huggingface.co/{push_to_hub}")


def _facts(exported: Exported) -> dict[str, Any]:
    """What `_describe` says, as JSON."""
    anew = [
        {
            "layer": one.name,
            "from": one.before.format.name,
            "to": one.after.format.name,
            "weight_error": [one.error_before, one.error_after],
        }
        for one in exported.requantized
    ]
    return {"bytes": exported.nbytes, "requantized": anew, "notes": list(exported.notes)}


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
