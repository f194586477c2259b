"""How fast single kernels are at the shapes of Stable Diffusion and SDXL, compared with torch's own layer.

Every kernel of the table that accepts a call is timed against the unquantized layer with the same weight. They take
turns in one process, and times include the quantization of the input. The ceiling of a compute mode is the highest
speed that any kernel reached on this machine, on three large products. Prints one table and writes JSON.

    python scripts/bench_kernels.py --json kernels.json
    python scripts/bench_kernels.py --device cuda --formats int4 --only "conv 3x3"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_case import Case
from bench_machine import clock, description, spread

from bitpolicy.kernels.compute.int8 import multiply
from bitpolicy.kernels.dispatch import TABLE, prepared
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Compute, Kernel, PackedWeight

_REFERENCES = (
    "reference",
    "int8-reference",
    "fp8-reference",
)  # plain torch code that the others are tested against; not timed


def linear(rows: int, inputs: int, out: int) -> Case:
    return Case("linear", (rows, inputs), (out, inputs))


def conv(size: int, channels: int, out: int, kernel: int, batch: int = 1) -> Case:
    return Case(f"conv {kernel}x{kernel}", (batch, channels, size, size), (out, channels, kernel, kernel))


CASES: dict[str, Sequence[Case]] = {
    "cpu": (
        *(linear(1, 64, 256), linear(1, 320, 1280), linear(1, 640, 1280), linear(1, 5120, 1280)),
        *(linear(2, 1280, 1280), linear(8, 1280, 1280), linear(16, 640, 640)),
        *(linear(77, 768, 320), linear(77, 2048, 1280)),
        *(linear(4096, 320, 320), linear(4096, 320, 2560), linear(1024, 640, 640), linear(1024, 640, 5120)),
        *(linear(256, 1280, 1280), linear(1024, 1280, 1280), linear(1024, 1280, 10240), linear(1024, 5120, 1280)),
        *(conv(64, 320, 320, 3), conv(32, 640, 640, 3), conv(16, 1280, 1280, 3), conv(8, 1280, 1280, 3)),
        *(conv(32, 1280, 640, 3), conv(64, 4, 320, 3), conv(64, 320, 4, 3)),
        *(conv(64, 320, 320, 1), conv(32, 640, 640, 1), conv(16, 1280, 1280, 1), conv(32, 1280, 640, 1)),
        *(conv(16, 64, 64, 3), conv(8, 96, 96, 3), conv(4, 152, 152, 3), conv(16, 64, 64, 1)),
        *(linear(256, 64, 64), linear(64, 96, 384)),
    ),
    "cuda": (),
}
CEILINGS = (linear(1024, 1024, 1024), conv(64, 320, 320, 3), conv(16, 1280, 1280, 3))


def packed(case: Case, format: str, device: str) -> PackedWeight:
    torch.manual_seed(0)
    known = format_named(format)
    stored = known.quantize(torch.randn(case.weight) / prod(case.weight[1:]) ** 0.5)
    return PackedWeight(known, case.weight, {name: t.to(device) for name, t in stored.items()}, case.geometry)


def contenders(
    case: Case, formats: Sequence[str], device: str, dtype: torch.dtype
) -> dict[tuple[str, str], tuple[Callable[[], torch.Tensor], Compute]]:
    """(kernel, format) -> the call and its compute mode. The first is the unquantized layer."""
    x = torch.randn(case.input, dtype=dtype, device=device)
    bias = torch.randn(case.weight[0], dtype=dtype, device=device)
    w = packed(case, formats[0], device).dequantize(dtype)
    name = str(dtype).removeprefix("torch.")
    found: dict[tuple[str, str], Any] = {("torch", name): (lambda: multiply(x, w, case.geometry, bias), Compute.EXACT)}
    for format in formats:
        weight = packed(case, format, device)
        for row in TABLE:
            once = row.kernel.compute is Compute.INT8 and device == "cpu" and format != formats[0]  # same layout
            if row.kernel.name not in _REFERENCES and not once and row.refuses(x, weight) is None:
                found[row.kernel.name, format] = (_call(row.kernel, x, weight, bias), row.kernel.compute)
    return found


def _call(kernel: Kernel, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor) -> Callable[[], torch.Tensor]:
    layout = prepared(kernel, weight, x.dtype)
    return lambda: kernel(x, weight, bias, layout)


def timed(
    calls: Sequence[Callable[[], torch.Tensor]], seconds: Callable[[], float], budget: float
) -> list[list[float]]:
    """Seconds per call in seven rounds of all calls; short calls are repeated to fill their share of the budget."""
    rounds, repeats = 7, []
    for call in calls:
        call()
        start = seconds()
        call()
        repeats.append(max(1, int(budget / rounds / max(seconds() - start, 1e-7))))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = seconds()
            for _ in range(repeats[i]):
                call()
            times[i].append((seconds() - start) / repeats[i])
    return times


def measure(case: Case, options: argparse.Namespace, seconds: Callable[[], float]) -> list[dict[str, Any]]:
    found = contenders(case, options.formats, options.device, options.dtype)
    times = timed([call for call, _ in found.values()], seconds, options.budget)
    base = median(times[0])
    return [
        {
            "layer": case.name,
            "shape": case.shape,
            "kernel": kernel,
            "format": format,
            "compute": compute.value,
            "us": 1e6 * median(own),
            "spread": spread(own),
            "ratio": base / median(own),
            "gops": case.operations / median(own) / 1e9,
        }
        for ((kernel, format), (_, compute)), own in zip(found.items(), times, strict=True)
    ]


def cuda_seconds() -> float:
    torch.cuda.synchronize()
    return clock(0)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=sorted(CASES))
    parser.add_argument("--formats", nargs="+", default=["int8", "int4"])
    parser.add_argument("--only", default="", help="cases whose name and shape contain this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per kernel and case")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    options.dtype = torch.float32 if options.device == "cpu" else torch.float16
    seconds = clock(options.threads) if options.device == "cpu" else cuda_seconds
    ceilings: dict[str, float] = {}
    for row in (row for case in CEILINGS for row in measure(case, options, seconds)):
        ceilings[row["compute"]] = max(row["gops"], ceilings.get(row["compute"], 0))
    print("ceiling: " + ", ".join(f"{compute} {gops:.0f} GOP/s" for compute, gops in ceilings.items()))
    print(f"{'layer':9} {'shape':28} {'kernel':15} {'format':8} {'us':>10} {'spread':>7} {'ratio':>6} {'ceiling':>8}")
    rows = []
    for case in (c for c in CASES[options.device] if options.only in f"{c.name} {c.shape}"):
        for row in measure(case, options, seconds):
            row["ceiling"] = row["gops"] / ceilings.get(row["compute"], ceilings[Compute.EXACT])
            rows.append(row)
            print(
                f"{row['layer']:9} {row['shape']:28} {row['kernel']:15} {row['format']:8} {row['us']:10.1f}"
                f" {row['spread']:7.0%} {row['ratio']:6.2f} {row['ceiling']:8.0%}",
                flush=True,
            )
        if options.json:  # after each case, so that an interrupted run keeps its results
            found = {"machine": description(options.threads), "ceilings": ceilings, "rows": rows}
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
