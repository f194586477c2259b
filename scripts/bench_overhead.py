"""What a call of a packed layer costs apart from its product, measured on layers so small that little else remains.

The script times an unquantized layer of 32 channels on one row or pixel, and packed ones in each compute mode. They
take turns in one process, and times include all of `Module.__call__`. With `--compile`, torch.compile compiles twenty
such layers in a row as one graph, and the table shows the time per layer. Prints one table and writes JSON.

    python scripts/bench_overhead.py --json overhead.json
    python scripts/bench_overhead.py --compile
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_machine import clock, description, spread
from torch import nn

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import pack_layer

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (nn.Linear(32, 32), (1, 32)),
    "conv 1x1": (nn.Conv2d(32, 32, 1), (1, 32, 1, 1)),
}
IN_A_ROW = 20  # spreads the cost of calling a compiled graph over many layers


def calls(layer: Any, x: torch.Tensor, format: str, layers: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The unquantized layer's call, then one per compute mode; more than one layer means a compiled row of them."""
    found = {"fp32": _call(layer, x, layers)}
    for compute in Compute:
        known = format_named(format)
        packed = pack_layer(layer, known, known.quantize(layer.weight.detach()))
        packed.compute = compute
        found[compute.value] = _call(packed, x, layers)
    return found


def _call(layer: nn.Module, x: torch.Tensor, layers: int) -> Callable[[], torch.Tensor]:
    if layers == 1:
        return lambda: layer(x)
    row = torch.compile(nn.Sequential(*(deepcopy(layer) for _ in range(layers))), fullgraph=True, dynamic=False)
    return lambda: row(x)


def measure(
    name: str, format: str, repeats: int, seconds: Callable[[], float], layers: int = 1
) -> list[dict[str, Any]]:
    torch.compiler.reset()  # otherwise its limit of recompilations stops it
    layer, size = LAYERS[name]
    found = calls(layer, torch.randn(size), format, layers)
    times: dict[str, list[float]] = {compute: [] for compute in found}
    for _ in range(8):  # the first round is not counted
        for compute, call in found.items():
            start = seconds()
            for _ in range(repeats // layers):
                call()
            times[compute].append(1e6 * (seconds() - start) / (repeats // layers * layers))
    middle = {compute: median(own[1:]) for compute, own in times.items()}
    return [
        {"layer": name, "format": format, "compute": compute, "us": us, "more": us - middle["fp32"]}
        | {"spread": spread(times[compute][1:]), "compiled": layers > 1}
        for compute, us in middle.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="int4")
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--compile", action="store_true", help=f"{IN_A_ROW} layers in one compiled graph")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    layers = IN_A_ROW if options.compile else 1
    rows = [row for name in LAYERS for row in measure(name, options.format, options.repeats, clock(1), layers)]
    print(f"{'layer':9} {'format':8} {'compute':8} {'us':>7} {'more':>7} {'spread':>7}")
    for row in rows:
        figures = f"{row['us']:7.2f} {row['more']:7.2f} {row['spread']:7.0%}"
        print(f"{row['layer']:9} {row['format']:8} {row['compute']:8} {figures}")
    if options.json:
        options.json.write_text(json.dumps({"machine": description(1), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
