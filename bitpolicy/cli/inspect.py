"""`bitpolicy inspect`: layers, roles, bytes and formats of a model, a policy or a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from bitpolicy.cli.options import Component, Debug, Json, Revision, Variant
from bitpolicy.kernels.format import Format
from bitpolicy.kernels.formats import FP16
from bitpolicy.kernels.layers import PackedLayer
from bitpolicy.loading import load_source, open_pipeline, packed_components
from bitpolicy.plan import class_name
from bitpolicy.policies.accounting import ByteAccount, stored_tensors
from bitpolicy.policies.denoiser import denoiser_names, denoiser_of, denoisers_in
from bitpolicy.policies.policy import Policy
from bitpolicy.sensitivity.inventory import inventory

What = Annotated[
    str | None,
    typer.Argument(help="Hub id, pipeline folder, checkpoint folder or policy.yaml. Default: the bundled pipeline."),
]


def inspect(
    what: What = None,
    component: Component = None,
    revision: Revision = None,
    variant: Variant = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List every layer with its role, stage, shape, format and bytes."""
    if what and Path(what).is_file():
        policy = Policy.load(what)
        rows = [{"layer": name, **entry.model_dump(exclude_none=True)} for name, entry in policy.layers.items()]
        default = ", ".join(f"{k} {v}" for k, v in policy.defaults.model_dump(exclude_none=True).items())
        title = f"policy for {policy.model.id} ({policy.model.class_name}); all other layers: {default}"
    elif what and (Path(what) / "policy.yaml").is_file():
        rows, title = _of_checkpoint(Path(what), component)
    else:
        rows, title = _of_model(what, component, revision, variant)
    if as_json:
        print(json.dumps({"title": title, "layers": rows}))
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console().print(table)


def _of_model(
    what: str | None, component: str | None, revision: str | None, variant: str | None
) -> tuple[list[dict[str, Any]], str]:
    source = load_source(what, component, dtype="auto", device="cpu", revision=revision, variant=variant)
    account = ByteAccount.of(source.denoiser, source.storage)
    rows = [
        _row(layer.name, layer.role, layer.stage, layer.shape, FP16, account.layer(layer.name, FP16))
        for layer in inventory(source.denoiser)
    ]
    return (
        rows,
        f"{source.id}: {class_name(source.denoiser)}, {len(rows)} layers, {account.reference:,} bytes at FP16",
    )


def _of_checkpoint(folder: Path, component: str | None) -> tuple[list[dict[str, Any]], str]:
    pipe = open_pipeline(folder)
    denoiser: Any = denoiser_of(pipe, denoiser_names(pipe, component or packed_components(folder)))
    formats = {name: module for name, module in denoiser.named_modules() if isinstance(module, PackedLayer)}
    total = sum(tensor.nbytes for tensor in stored_tensors(denoiser).values())
    packed_bytes = {name: sum(t.nbytes for t in module.packed_tensors().values()) for name, module in formats.items()}
    layers = inventory(_unpacked_view(denoiser, formats))
    rows = []
    for layer in layers:
        format = formats[layer.name].format if layer.name in formats else FP16
        nbytes = packed_bytes.get(layer.name) or denoiser.get_submodule(layer.name).weight.nbytes
        rows.append(_row(layer.name, layer.role, layer.stage, layer.shape, format, nbytes))
    return rows, f"{folder}: {class_name(denoiser)}, {len(rows)} layers, {total:,} bytes"


def _unpacked_view(denoiser: Any, packed: dict[str, PackedLayer]) -> nn.Module:
    """The same model with ordinary layers, so that roles are told as they are for the model it was made from."""
    parts: list[Any] = denoisers_in(denoiser) if packed else []
    for part in parts:
        part.dequantize()
    return denoiser


def _row(name: str, role: str, stage: str, shape: tuple[int, ...], format: Format, nbytes: int) -> dict[str, Any]:
    return {
        "layer": name,
        "role": role,
        "stage": stage,
        "shape": "x".join(map(str, shape)),
        "format": format.name,
        "bytes": nbytes,
    }
