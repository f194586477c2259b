"""The implementation of `bitpolicy export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitpolicy.api import export as export_policy
from bitpolicy.api import export_for
from bitpolicy.cli.command_options import ExportOptions
from bitpolicy.cli.running.results import print_json
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.loading import BUNDLED
from bitpolicy.policies.exporters.export import Exported
from bitpolicy.policies.exporters.targets import exporter_named
from bitpolicy.policies.policy import Policy
from bitpolicy.search.budget import readable


def run(options: ExportOptions) -> None:
    """Run the command with these options."""
    loaded = Policy.load(options.policy)
    if options.requantize and options.target is None:
        raise BitPolicyError("--requantize is for another program's formats; add --target, or leave it out")
    if options.target is not None:
        _export_for(options, options.target)
        return
    nbytes = export_policy(
        options.model or BUNDLED,
        options.policy,
        options.output_dir,
        max_shard_size=options.max_shard_size,
        push_to_hub=options.push_to_hub,
        compute=options.compute,
        revision=options.revision,
        variant=options.variant,
        config=options.config,
        overwrite=options.overwrite,
    )
    if options.as_json:
        found = {"bytes": nbytes, "component": loaded.model.component, "compute": options.compute or loaded.compute}
        print_json({**found, "pushed_to": options.push_to_hub, "output_dir": str(options.output_dir)})
        return
    print(
        f"{options.output_dir}: {nbytes:,} bytes in {loaded.model.component} ({readable(nbytes)}), "
        f"policy with {len(loaded.layers)} layer entries"
    )
    if options.push_to_hub:
        print(f"pushed to https://huggingface.co/{options.push_to_hub}")


def _export_for(options: ExportOptions, target: str) -> None:
    """Write another program's files."""
    if options.compute is not None:
        raise BitPolicyError("--compute is recorded only in bitpolicy checkpoints; leave out --target or --compute")
    exporter_named(target)
    if options.push_to_hub is not None:
        raise BitPolicyError("--push-to-hub is for a whole pipeline; leave out --target, or upload the folder yourself")
    exported = export_for(
        options.model or BUNDLED,
        options.policy,
        options.output_dir,
        target,
        requantize=options.requantize,
        revision=options.revision,
        variant=options.variant,
        config=options.config,
        overwrite=options.overwrite,
    )
    if options.as_json:
        print_json({**_facts(exported), "target": target, "output_dir": str(options.output_dir)})
    else:
        _describe(exported, options.output_dir, target)


def _facts(exported: Exported) -> dict[str, Any]:
    """The content of `_describe` as JSON."""
    again = [
        {
            "layer": one.name,
            "from": one.before.format.name,
            "to": one.after.format.name,
            "weight_error": [one.error_before, one.error_after],
        }
        for one in exported.requantized
    ]
    return {"bytes": exported.nbytes, "requantized": again, "notes": list(exported.notes)}


def _describe(exported: Exported, output_dir: Path, target: str) -> None:
    """Print what was written, what was rounded again, and what was left out."""
    size = f"{exported.nbytes:,} bytes of weights ({readable(exported.nbytes)})" if exported.nbytes else "a recipe"
    print(f"{output_dir}: {size} for {exporter_named(target).title}")
    if exported.requantized:
        print(f"{len(exported.requantized)} layers were rounded again; weight error before, after and added:")
    for one in exported.requantized:
        errors = f"{one.error_before:7.3%} {one.error_after:7.3%} {one.error_after - one.error_before:+8.3%}"
        print(f"  {errors}  {one.name}: {one.before.format.name} -> {one.after.format.name}")
    for note in exported.notes:
        print(note)
