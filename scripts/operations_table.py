"""Write docs/operations.md: which class of model and pipeline goes along with which operation once it is packed.

The cells are those of tests/policies/operations.yaml, each of which tests/policies/test_operations.py checks.

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
# What a packed model goes along with

Each cell is one test of [test_operations.py](../tests/policies/test_operations.py), on a toy of the real class with
every format in turn on its layers, on the CPU. The operations are in [operations.py](../tests/toys/operations.py), what
is expected of each cell in [operations.yaml](../tests/policies/operations.yaml). This page is written from that by
`python scripts/operations_table.py --write`, and a test compares. Going to a GPU and back, whole or offloaded, is in
[test_cpu_offload.py](../tests/policies/test_cpu_offload.py), which runs where there is one.

| | |
|---|---|
| pass | the test passes: outputs are those of an ordinary model with the same weights, bit for bit |
| fail | the test fails, and is expected to; why is told below |
| n/a | the class does not have the method; the test checks that |
"""
KINDS = """\
## Kinds of layers

`nn.Linear` and `nn.Conv1d/2d/3d` themselves are packed, whatever their groups, strides, dilation and padding.
All else stays in the storage dtype and counts with that in every budget: transposed convolutions, subclasses of these
layers, a layer that shares its weight with another. A search warns once which layers these are.
"""

SUITE = """\
## diffusers' own tests

diffusers tests bitsandbytes, quanto, torchao and others by the cases of its `tests/models/testing_utils/`. On packed
models they are run by

    python scripts/diffusers_suite.py --diffusers CHECKOUT -k "not Compile"

which prints a row for each case. CHECKOUT is one of diffusers, of the installed version. With diffusers 0.40.0 on the
CPU, tiny models of `UNet2DConditionModel`, `FluxTransformer2DModel`, `SD3Transformer2DModel`, `WanTransformer3DModel`,
in INT8 and in seven formats in turn: 158 pass, 20 fail as is known, 70 are skipped, and no other fails.

| cases | outcome |
| --- | --- |
| inference, with and without LoRA; training of an adapter | pass |
| serialization, of the config, too, and in shards; `device_map`; `dequantize` | pass |
| counts of layers, parameters and bytes; layers left out; the dtype before | pass |
| modules kept in float32 | pass for Wan, skipped where the class has none |
| LoRA: saved and loaded, with DoRA, a bias, other ranks, in little memory; metadata; warnings | pass |
| layerwise casting: memory | pass |
| `.to(dtype)`, `.half()` | known: they ask for a ValueError, where a packed model is cast |
| LoRA under layerwise casting | known: they ask for weights in float8, where packed ones stay as they are |
| LoRA fused with infinities | known: diffusers expects that to fail on the CPU |
| layerwise casting: training | skipped by diffusers on the CPU |
| offloading by groups, to the CPU, to disk | skipped: they split a model between a GPU and the CPU |

The cases of `torch.compile` build C++ for minutes and are not in this count.
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
        "`ToyConvolutions` is no class of diffusers: it has one layer of each kind below.\n",
        *section("Pipelines", expected["pipeline_operations"], expected["pipelines"]),
        KINDS,
        table(("layer", "outcome"), [(kind, outcome) for kind, outcome in expected["kinds"].items()]),
        SUITE,
    ]
    return "\n".join(parts)


def section(title: str, operations: Mapping[str, str], rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What the operations are, a row for each class, and why cells fail."""
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
        yield "Failing:\n"
        yield "".join(reasons)


def cell(operation: str, about: Mapping[str, Any]) -> str:
    known = {"fail": "**fail**", "not_applicable": "n/a"}
    return next((word for key, word in known.items() if operation in about.get(key, ())), "pass")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
