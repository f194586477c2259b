"""Write and read the files of a sensitivity table.

`sensitivity.safetensors` holds the numbers and a description of the model; `sensitivity.csv` holds the numbers for
people and spreadsheets.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.quantizers.named import RTN
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.storage.atomic import write_text, written_aside
from bitpolicy.policies.storage.file_source import open_tensors
from bitpolicy.policies.storage.sealed import sealed, unsealed
from bitpolicy.sensitivity.cost.forwards import Cost
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.table import SensitivityTable

_TENSORS = ("error", "corrected", "sketches", "measured", "quantizer", "inputs")


@dataclass(frozen=True)
class ModelContext:
    """What a reader of the table needs to know about the model, without the model itself.

    Attributes:
        inventory: its layers.
        account: their bytes.
        name: for people, e.g. "UNet2DConditionModel of owner/name"; empty if unknown.
    """

    inventory: Sequence[Layer]
    account: ByteAccount
    name: str = ""

    def as_json(self) -> dict[str, Any]:
        storage = str(self.account.storage_dtype).removeprefix("torch.")
        layers = [asdict(layer) for layer in self.inventory]
        return {
            "name": self.name,
            "layers": layers,
            "storage_dtype": storage,
            "fixed": self.account.fixed,
            "parameters": self.account.parameters,
        }

    @classmethod
    def load(cls, path: Path) -> ModelContext:
        """Read it from `sensitivity.safetensors`.

        Raises:
            BitPolicyError: the file is missing or is not a sensitivity table.
        """
        try:
            found = _read(path)[0]["model"]
            layers = [Layer(**{**layer, "shape": tuple(layer["shape"])}) for layer in found["layers"]]
            shapes = {layer.name: layer.shape for layer in layers}
            storage = getattr(torch, found["storage_dtype"])
            return cls(layers, ByteAccount(storage, shapes, found["fixed"], found["parameters"]), found["name"])
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
            raise BitPolicyError(
                f"cannot read sensitivity table {path}: {error}; run `bitpolicy probe` again"
            ) from error


def write_table(table: SensitivityTable, folder: Path, model: ModelContext) -> None:
    """Write both files into `folder`.

    Args:
        model: the model that the table describes.
    """
    tensors = {name: tensor.contiguous() for name in _TENSORS if (tensor := getattr(table, name)) is not None}
    facts = {
        "probe": table.probe,
        "layers": table.layers,
        "formats": [f.name for f in table.formats],
        "cost": None if table.cost is None else asdict(table.cost),
        "quantizers": table.quantizers,
        **({} if table.compute is Compute.EXACT else {"compute": table.compute.value}),
        "model": model.as_json(),
    }
    with written_aside(folder / "sensitivity.safetensors") as aside:
        save_file(tensors, aside, metadata={"bitpolicy": json.dumps(sealed(facts, tensors))})
    write_text(folder / "sensitivity.csv", _csv(table, model.inventory, model.account))


def read_table(path: Path) -> SensitivityTable:
    """Read `sensitivity.safetensors`.

    Raises:
        BitPolicyError: the file is missing or is not a sensitivity table.
    """
    try:
        facts, tensors = _read(path)
        return SensitivityTable(
            facts["probe"],
            tuple(facts["layers"]),
            tuple(format_named(name) for name in facts["formats"]),
            **{name: tensor for name, tensor in tensors.items() if name in _TENSORS},
            cost=Cost(**facts["cost"]) if facts.get("cost") else None,
            quantizers=tuple(facts.get("quantizers", (RTN,))),
            compute=Compute(facts.get("compute", Compute.EXACT)),
        )
    except (OSError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise BitPolicyError(f"cannot read sensitivity table {path}: {error}; run `bitpolicy probe` again") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description and the tensors in a table's file, checked against its checksum; older files have none."""
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return unsealed(json.loads((file.metadata() or {})["bitpolicy"]), tensors), tensors


def _csv(table: SensitivityTable, inventory: Sequence[Layer], account: ByteAccount) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    names = "layer role stage kind shape format bytes error bias_corrected quantizer source".split()
    rows.writerow(names if table.inputs is None else [*names, "inputs_share"])
    for i, layer in enumerate(inventory):
        for j, format in enumerate(table.formats):
            shape = "x".join(map(str, layer.shape))
            row: list[object] = [layer.name, layer.role, layer.stage, layer.kind, shape, format.name]
            row += [
                account.layer(layer.name, format),
                f"{float(table.error[i, j]):.6e}",
                bool(table.corrected[i, j]),
                table.choice(i, format).quantizer,
                table.source(i, j),
            ]
            share = table.inputs_share(i, j)
            row += [] if share is None else [f"{share:.4f}"]
            rows.writerow(row)
    return text.getvalue()
