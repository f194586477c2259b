"""How fast packed layers and UNets are on a CPU, compared with torchao, SDNQ and comfy-kitchen.

Every contender gets the same weights and inputs. They take turns in one process, and times include the quantization of
the input. torchao is compiled by torch.compile, as it is meant to be, and SDNQ compiles its own functions; the others
run uncompiled. With `--compile` every contender is compiled whole. `ratio` is the speed relative to torch's own layers
in the requested dtype, `error` the relative distance from their output, and `bytes` the memory that the weights take
between calls, layouts included. Prints a table per case and writes JSON. Needs the extra `[exporters]`.

    python scripts/bench_rivals.py --json rivals.json
    python scripts/bench_rivals.py --only "conv 3x3" --dtype bfloat16
    python scripts/bench_rivals.py --only "UNet bundled" --compile
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_case import Case
from bench_contenders import by_comfy, by_sdnq, by_torchao, packed, require_known
from bench_kernels import conv, linear, timed
from bench_machine import clock, description, spread
from bench_unet import MODELS, Model
from torch import nn

from bitpolicy.kernels.compute.setting import resident_bytes

CONTENDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": lambda model: model,
    "int8 weights": partial(packed, format="int8", compute="exact"),
    "int4 weights": partial(packed, format="int4", compute="exact"),
    "int4 weights, float": partial(packed, format="int4", compute="float"),
    "int8 compute, int8": partial(packed, format="int8", compute="int8"),
    "int8 compute, int4": partial(packed, format="int4", compute="int8"),
    "torchao int8 weights": partial(by_torchao, what="int8-weights"),
    "torchao int4 weights": partial(by_torchao, what="int4-weights"),
    "torchao int8 compute": by_torchao,
    "SDNQ int8 weights": partial(by_sdnq, matmul=False),
    "SDNQ uint4 weights": partial(by_sdnq, weights="uint4", matmul=False),
    "SDNQ int8 compute": by_sdnq,
    "comfy int8 compute": by_comfy,
}
LAYERS = (
    *(linear(1, 1280, 1280), linear(2, 1280, 1280), linear(77, 2048, 1280), linear(4096, 320, 320)),
    *(linear(256, 1280, 1280), linear(1024, 640, 5120), linear(1024, 5120, 1280)),
    *(conv(64, 320, 320, 3), conv(32, 640, 640, 3), conv(16, 1280, 1280, 3), conv(32, 640, 640, 1)),
)


def cases() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]]]:
    """Name of each case, and the function that builds its model and inputs."""
    for case in LAYERS:
        yield f"{case.name} {case.shape}", partial(_layer, case)
    for model in MODELS:
        yield f"UNet {model.name}, {model.batch} x {model.latent} x {model.latent}", partial(_unet, model)


def _layer(case: Case) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    out, channels, *kernel = case.weight
    layer = nn.Conv2d(channels, out, tuple(kernel), case.stride, kernel[0] // 2) if kernel else nn.Linear(channels, out)
    return layer, (torch.randn(case.input),)


def _unet(model: Model) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    unet = model.build().eval()
    return unet, model.inputs(unet)


def measure(
    build: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each contender: its figures, or why it does not work."""
    model, given = build()
    model = model.to(options.dtype).requires_grad_(False)
    inputs = [x.to(options.dtype) if x.is_floating_point() else x for x in given]
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in options.contenders:
        try:
            own = CONTENDERS[name](model)
            if options.compile or name.startswith("torchao"):
                own = torch.compile(own)  # type: ignore[assignment]
            call = partial(_output, own, inputs)
            rows[name] = {"error": _distance(call(), _output(model, inputs)), "bytes": _held(own)}
            calls[name] = call
        except Exception as error:  # noqa: BLE001 # code of other projects, which may raise anything
            rows[name] = {"unavailable": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    times = dict(zip(calls, timed(list(calls.values()), clock(options.threads), options.budget), strict=True))
    for name, own_times in times.items():
        ratio = median(times["torch"]) / median(own_times)
        rows[name] |= {"ms": 1e3 * median(own_times), "spread": spread(own_times), "ratio": ratio}
    return [{"contender": name, **row} for name, row in rows.items()]


def _output(model: nn.Module, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    output = model(*inputs)
    return output if isinstance(output, torch.Tensor) else output.sample


def _distance(output: torch.Tensor, truth: torch.Tensor) -> float:
    return float((output.float() - truth.float()).norm() / truth.float().norm())


def _held(model: nn.Module) -> int:
    """Bytes of parameters, buffers and our layouts; looks inside the tensor classes of other projects."""
    tensors = [inner for t in (*model.parameters(), *model.buffers()) for inner in _plain(t)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + resident_bytes(model).layouts


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def shown(row: dict[str, Any]) -> str:
    if "unavailable" in row:
        return f"  {row['contender']:22} unavailable: {row['unavailable']}"
    return (
        f"  {row['contender']:22} {row['ms']:10.3f} ms {row['spread']:5.0%} {row['ratio']:6.2f} x torch"
        f"  error {row['error']:.1e}  {row['bytes'] / 1e6:9.2f} MB"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), help="any of %(default)s (default: all)")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the inputs and of torch's layer"
    )
    parser.add_argument("--compile", action="store_true", help="use torch.compile for every contender")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per contender and case")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    require_known(parser, chosen.contenders, CONTENDERS)
    if not any(chosen.only in name for name, _ in cases()):
        parser.error(f"no case contains {chosen.only!r}; the cases are {'; '.join(name for name, _ in cases())}")
    chosen.contenders = ["torch", *(name for name in chosen.contenders if name != "torch")]
    chosen.dtype = getattr(torch, chosen.dtype)
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    results = []
    for name, build in cases():
        if options.only not in name:
            continue
        rows = measure(build, options)
        results.append({"case": name, "rows": rows})
        print("\n".join([name, *map(shown, rows)]), flush=True)
        if options.json:  # after each case, so that an interrupted run keeps its results
            settings = {"dtype": str(options.dtype).removeprefix("torch."), "compiled": options.compile}
            found = {"machine": description(options.threads), **settings, "results": results}
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
