"""The implementation of `bitpolicy inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from bitpolicy.cli.command_options import InspectOptions
from bitpolicy.cli.running.tables import print_table
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16
from bitpolicy.pipelines.loading import load_source, open_pipeline, packed_components
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.components import asked_components, to_text
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.inventory import inventory


def run(options: InspectOptions) -> None:
    """Run the command with these options."""
    what = options.what
    folder = what is not None and (Path(what) / "policy.yaml").is_file()
    if options.kernels:
        if not folder:
            raise BitPolicyError(
                f"--kernels needs a checkpoint, and {what or 'the bundled pipeline'} is not one; give the folder that "
                "search-policy or export wrote"
            )
        from bitpolicy.cli.running.kernels_in_use import kernels_in_use  # imports all of the library

        rows, title = kernels_in_use(options, Path(str(what)))
        shown = [{key: value for key, value in row.items() if options.as_json or key != "passed over"} for row in rows]
        _print(shown, title, options.as_json)
        return
    if what and Path(what).is_file():
        policy = Policy.load(what)
        rows = [{"layer": name, **entry.model_dump(exclude_none=True)} for name, entry in policy.layers.items()]
        default = ", ".join(f"{k} {v}" for k, v in policy.defaults.model_dump(exclude_none=True).items())
        title = f"policy for {policy.model.id} ({policy.model.class_name}); all other layers: {default}"
    elif folder:
        rows, title = _of_checkpoint(Path(str(what)), options.component)
    else:
        rows, title = _of_model(what, options.component, options.revision, options.variant)
    _print(rows, title, options.as_json)


def _print(rows: list[dict[str, Any]], title: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"title": title, "layers": rows}))
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    print_table(table)


def _of_model(
    what: str | None, component: str | None, revision: str | None, variant: str | None
) -> tuple[list[dict[str, Any]], str]:
    components = asked_components(component)
    source = load_source(what, components, dtype="auto", device="cpu", revision=revision, variant=variant)
    account = ByteAccount.of(source.target, source.storage)
    rows = [
        _row(layer.name, layer.role, layer.stage, layer.shape, FP16, account.layer(layer.name, FP16))
        for layer in inventory(source.target)
    ]
    return (
        rows,
        f"{source.id}: {_classes(source.target)}, {len(rows)} layers, {account.reference:,} bytes at FP16",
    )


def _of_checkpoint(folder: Path, component: str | None) -> tuple[list[dict[str, Any]], str]:
    pipe = open_pipeline(folder)
    target = Target.chosen(pipe, asked_components(component) or packed_components(folder))
    formats = target.packed_layers
    total = sum(tensor.nbytes for tensor in target.stored_tensors().values())
    packed_bytes = {name: sum(t.nbytes for t in module.packed_tensors().values()) for name, module in formats.items()}
    if formats:  # roles are found from ordinary layers, as for the original model
        unpacked: list[Any] = target.models
        for model in unpacked:
            model.dequantize()
    layers = inventory(target)
    rows = []
    for layer in layers:
        format = formats[layer.name].format if layer.name in formats else FP16
        nbytes = packed_bytes.get(layer.name) or target.layers[layer.name].weight.nbytes
        rows.append(_row(layer.name, layer.role, layer.stage, layer.shape, format, nbytes))
    return rows, f"{folder}: {_classes(target)}, {len(rows)} layers, {total:,} bytes"


def _classes(target: Target) -> str:
    """The classes of its models, each once."""
    return to_text(dict.fromkeys(target.class_names))


def _row(name: str, role: str, stage: str, shape: tuple[int, ...], format: Format, nbytes: int) -> dict[str, Any]:
    return {
        "layer": name,
        "role": role,
        "stage": stage,
        "shape": "x".join(map(str, shape)),
        "format": format.name,
        "bytes": nbytes,
    }
