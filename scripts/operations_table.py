"""Write docs/operations.md: which operations work with which packed model and pipeline classes.

The cells come from tests/policies/operations.yaml. tests/policies/test_operations.py checks each of them.

    python scripts/operations_table.py           # prints the page
    python scripts/operations_table.py --write
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = ROOT / "tests" / "policies" / "operations.yaml"
PAGE = ROOT / "docs" / "operations.md"
INTRO = """\
# Operations that work with a packed model

Each cell is one test in [test_operations.py](../tests/policies/test_operations.py). It runs on the CPU, on a toy model
of the real class, with every format in turn on its layers. [operations.py](../tests/toys/operations.py) defines the
operations, and [operations.yaml](../tests/policies/operations.yaml) the expected outcome of each cell.
Some classes run by default, the others with `pytest -m every_pipeline tests/policies/test_operations.py`.
`python scripts/operations_table.py --write` writes this page from that file, and a test checks that it is up to date.
[test_cpu_offload.py](../tests/policies/test_cpu_offload.py) tests moving a model to a GPU and back, whole or offloaded;
it runs where there is a GPU.

| | |
|---|---|
| pass | the test passes: outputs equal those of an ordinary model with the same weights, bit for bit |
| fail | the test is expected to fail, and does; the reason is below the table |
| n/a | the class does not have the method; the test checks that |
"""
KINDS = """\
## Kinds of layers

`nn.Linear` and `nn.Conv1d/2d/3d` are packed, whatever their groups, strides, dilation and padding. Everything else
stays in the storage dtype and counts at that size in every budget: transposed convolutions, subclasses of these layers,
and a layer that shares its weight with another. A search warns once which layers these are.
"""

SUITE = """\
## diffusers' own tests

diffusers tests bitsandbytes, quanto, torchao and others with the cases in its `tests/models/testing_utils/`. This
command runs them on packed models and prints a row for each case:

    python scripts/diffusers_suite.py --diffusers CHECKOUT

CHECKOUT is a checkout of the installed diffusers version. With diffusers 0.40.0 on the CPU, on tiny models of
`UNet2DConditionModel`, `FluxTransformer2DModel`, `SD3Transformer2DModel` and `WanTransformer3DModel`, in INT8 and in
seven formats in turn, 185 cases pass, 20 fail for known reasons, 79 are skipped, and no other case fails.

| cases | outcome |
| --- | --- |
| inference, with and without LoRA; training of an adapter | pass |
| serialization, including the config and shards; `device_map`; `dequantize` | pass |
| counts of layers, parameters and bytes; excluded layers; the original dtype | pass |
| modules kept in float32 | pass for Wan, skipped where the class has none |
| LoRA: saved and loaded, with DoRA, a bias, other ranks, low memory; metadata; warnings | pass |
| layerwise casting: memory | pass |
| `.to(dtype)`, `.half()` | known failure: they expect a ValueError, but a packed model is cast |
| LoRA under layerwise casting | known failure: they expect weights in float8, but packed weights stay as they are |
| LoRA fused with infinities | known failure: diffusers expects that to fail on the CPU |
| layerwise casting: training | skipped by diffusers on the CPU |
| offloading by groups, to the CPU, to disk | skipped: they split a model between a GPU and the CPU |
| `torch.compile`, whole: no graph break, no recompilation; with offloading by groups; ahead of time | pass |
| `torch.compile` of repeated blocks | pass; SD3 has none; equal blocks of unequal formats compile once each |
| `torch.compile` with offloading by groups through streams | skipped: streams need a GPU |
"""


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")


def page() -> str:
    expected = yaml.safe_load(EXPECTED.read_text(encoding="utf-8"))
    parts = [
        INTRO,
        *section("Models", expected["operations"], expected["models"]),
        "`ToyConvolutions` is not a diffusers class: it has one layer of each kind listed below.\n",
        *section("Pipelines", expected["pipeline_operations"], expected["pipelines"]),
        KINDS,
        table(("layer", "outcome"), [(kind, outcome) for kind, outcome in expected["kinds"].items()]),
        SUITE,
    ]
    return "\n".join(parts)


def section(title: str, operations: Mapping[str, str], rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The operations, a row for each class, and the reasons for failures."""
    yield f"## {title}\n"
    yield table(("operation", "what is checked"), [(f"`{name}`", about) for name, about in operations.items()])
    yield table(
        ("class", *(name.replace("_", " ") for name in operations)),
        [(f"`{row}`", *(cell(name, about) for name in operations)) for row, about in rows.items()],
    )
    reasons = [
        f"* `{row}`, {name.replace('_', ' ')}: {reason}\n"
        for row, about in rows.items()
        for name, reason in about.get("fail", {}).items()
    ]
    if reasons:
        yield "Reasons for failures:\n"
        yield "".join(reasons)


def cell(operation: str, about: Mapping[str, Any]) -> str:
    known = {"fail": "**fail**", "not_applicable": "n/a"}
    return next((word for key, word in known.items() if operation in about.get(key, ())), "pass")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
