"""How fast the Triton kernels are on an NVIDIA GPU, compared with torch's fp16 layer and with other projects.

Every contender runs as a CUDA graph that includes the quantization of its input. The contenders take turns in one
process, a few replays at a time. Times are medians over the rounds; the spread is half the interquartile range. A ratio
above 1 means faster than fp16. The ceiling is the speed of cuBLAS on one large product in the same arithmetic, measured
on the same GPU. Rivals that are not installed or that fail are listed as unavailable. The last case is a U-Net of
SDXL's shape with random weights.

    python scripts/bench_cuda.py --json cuda.json
    python scripts/bench_cuda.py --list
    python scripts/bench_cuda.py --only conv --contenders fp16,w8a8,w4a8 --tune
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from bench_case import Case
from bench_contenders import by_comfy, by_sdnq, by_torchao, packed, require_known
from torch import nn

from bitpolicy.kernels.dispatch import use_kernels

Call = Callable[[], torch.Tensor]


CASES = (
    Case("SDXL feed-forward, 2048 rows", (2048, 1280), (10240, 1280)),
    Case("SDXL feed-forward out, 2048 rows", (2048, 5120), (1280, 5120)),
    Case("SDXL feed-forward, 8192 rows", (8192, 640), (5120, 640)),
    Case("SDXL attention, 2048 rows", (2048, 1280), (1280, 1280)),
    Case("DiT feed-forward, 4096 rows", (4096, 3072), (12288, 3072)),
    Case("DiT feed-forward out, 4096 rows", (4096, 12288), (3072, 12288)),
    Case("cross attention, 154 rows", (154, 2048), (1280, 2048)),
    Case("DiT feed-forward, 64 rows", (64, 3072), (12288, 3072)),
    Case("DiT modulation, 2 rows", (2, 3072), (18432, 3072)),
    Case("SDXL conv 3x3 320, 128 x 128", (2, 320, 128, 128), (320, 320, 3, 3)),
    Case("SDXL conv 3x3 640, 64 x 64", (2, 640, 64, 64), (640, 640, 3, 3)),
    Case("SDXL conv 3x3 1280, 32 x 32", (2, 1280, 32, 32), (1280, 1280, 3, 3)),
    Case("SDXL conv 3x3 2560 to 1280, 32 x 32", (2, 2560, 32, 32), (1280, 2560, 3, 3)),
    Case("SDXL conv 3x3 640 with stride 2, 64 x 64", (2, 640, 64, 64), (640, 640, 3, 3), 2),
    Case("SDXL conv 1x1 1920 to 640, 64 x 64", (2, 1920, 64, 64), (640, 1920, 1, 1)),
)
UNET = "SDXL-shaped U-Net, 128 x 128, batch 2"
OURS = {
    "w8a8": ("int8", "int8", "triton-int8"),
    "w4a8": ("int4", "int8", "triton-int8"),
    "w8a8-float8": ("fp8", "fp8", "triton-fp8"),
    "w8a16": ("int8", "float", "triton-float"),
    "w4a16": ("int4", "float", "triton-float"),
    "w8a16-unpacked": ("int8", "exact", "triton-dequantize"),
    "w4a16-unpacked": ("int4", "exact", "triton-dequantize"),
}
"""Our own contenders: format, compute mode, kernel."""
ARITHMETIC = {
    **dict.fromkeys(("w8a8", "w4a8", "torchao-int8", "sdnq-int8", "comfy-int8"), "integer"),
    "w8a8-float8": "float8",
}
"""What each contender multiplies, unless that is 16-bit floats."""


RIVALS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao-int8": lambda model: torch.compile(by_torchao(model), mode="max-autotune-no-cudagraphs"),
    "sdnq-int8": by_sdnq,
    "comfy-int8": by_comfy,
}
CONTENDERS = ("fp16", *OURS, *RIVALS)


def contender(name: str, model: nn.Module) -> tuple[nn.Module, str]:
    """The contender's model, and the value of BITPOLICY_KERNELS that it runs with."""
    if name == "fp16":
        return model, "auto"
    if name in OURS:
        format, compute, kernel = OURS[name]
        if ARITHMETIC.get(name) == "float8" and not multiplies_float8():
            raise ValueError("this GPU does not multiply float8")
        return packed(model, format, compute).to(memory_format=torch.channels_last), kernel
    return RIVALS[name](model), "auto"


# Timing


def captured(model: nn.Module, kernel: str, inputs: dict[str, Any]) -> Call:
    """Replay one call as a CUDA graph. Three calls before the capture compile, choose a kernel and tune it."""
    with torch.no_grad(), use_kernels(kernel):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(**inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(**inputs)

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def timed(call: Call, replays: int) -> float:
    """Milliseconds per replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / replays


def by_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in every round; a turn is about 20 ms of replays."""
    replays = {name: max(1, int(20 / max(timed(call, 3), 1e-3))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, replays[name]))
    return times


def multiplies_float8() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


def float8_product(a: torch.Tensor) -> torch.Tensor:
    """a a^T of float8, in float16."""
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, a.T, scale_a=one, scale_b=one, out_dtype=torch.float16)


def ceilings() -> dict[str, float]:
    """Operations per second of cuBLAS on 8192 x 8192 x 8192, in each arithmetic that the GPU supports."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    a8 = a.to(torch.float8_e4m3fn)
    codes = torch.randint(-127, 128, (8192, 8192), device="cuda", dtype=torch.int8)
    products: dict[str, Call] = {"float": lambda: a @ a.T, "integer": lambda: torch._int_mm(codes, codes.T)}
    if multiplies_float8():
        products["float8"] = lambda: float8_product(a8)
    times = by_turns(products, 5)
    return {name: 2 * 8192**3 / (median(each) / 1e3) for name, each in times.items()}


# Cases


def layer_of(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    """An fp16 layer with random weights, and its input."""
    torch.manual_seed(0)
    out, channels, *kernel = case.weight
    x = torch.randn(case.input, device="cuda", dtype=torch.float16)
    if not kernel:
        return nn.Linear(channels, out, device="cuda", dtype=torch.float16), {"input": x}
    pads = tuple(k // 2 for k in kernel)
    layer = nn.Conv2d(channels, out, tuple(kernel), case.stride, pads, device="cuda", dtype=torch.float16)
    return layer.to(memory_format=torch.channels_last), {"input": x.to(memory_format=torch.channels_last)}


class Sample(nn.Module):
    """The U-Net's output as a tensor."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, **inputs: Any) -> torch.Tensor:
        return self.unet(**inputs, return_dict=False)[0]


def unet_of_sdxl() -> tuple[nn.Module, dict[str, Any]]:
    """The U-Net of stabilityai/stable-diffusion-xl-base-1.0 with random weights, and inputs for two samples."""
    from diffusers import UNet2DConditionModel

    with torch.device("cuda"):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        like = {"dtype": torch.float16}
        inputs = {
            "sample": torch.randn(2, 4, 128, 128, **like).to(memory_format=torch.channels_last),  # type: ignore[arg-type]
            "timestep": torch.tensor(500),
            "encoder_hidden_states": torch.randn(2, 77, 2048, **like),  # type: ignore[arg-type]
            "added_cond_kwargs": {"text_embeds": torch.randn(2, 1280, **like), "time_ids": torch.ones(2, 6, **like)},  # type: ignore[arg-type]
        }
    return Sample(unet.half().eval()).to(memory_format=torch.channels_last), inputs


def measured(name: str, model: nn.Module, inputs: dict[str, Any], names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Times of every contender that works, the reasons why others do not, and errors relative to fp16."""
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for each in names:
        try:
            calls[each] = captured(*contender(each, model), inputs)
        except Exception as error:  # noqa: BLE001 # code of other projects, which may raise anything
            absent[each] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    outputs = {each: call().float() for each, call in calls.items()}
    plain = outputs.get("fp16")
    errors = {} if plain is None else {each: float((y - plain).norm() / plain.norm()) for each, y in outputs.items()}
    return {"case": name, "times_ms": by_turns(calls, rounds), "unavailable": absent, "relative_error": errors}


def described(result: dict[str, Any], operations: int | None, ceiling: dict[str, float]) -> list[str]:
    """The lines of the table for one case."""
    times, lines = result["times_ms"], [result["case"]]
    for name, each in times.items():
        low, _, high = quantiles(each, n=4)
        ratio = f"{median(times['fp16']) / median(each):6.2f} x fp16" if "fp16" in times else ""
        share = ""
        if operations is not None:
            top = ceiling[ARITHMETIC.get(name, "float")]
            share = f"{operations / (median(each) / 1e3) / top:7.0%} of ceiling"
        error = result["relative_error"].get(name)
        wrong = "" if error is None else f"  error {error:.2e}"
        lines.append(f"  {name:16} {median(each):9.4f} ms  +- {(high - low) / 2:.4f} {ratio} {share}{wrong}")
    return [*lines, *(f"  {name:16} unavailable: {why}" for name, why in result["unavailable"].items())]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument(
        "--contenders", default=",".join(CONTENDERS), help="any of %(default)s, separated by commas (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timing rounds per contender, at least 2")
    parser.add_argument("--tune", action="store_true", help="first tune the tile sizes of each product")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--json", type=Path, help="write the results here")
    chosen = parser.parse_args(arguments)
    require_known(parser, chosen.contenders.split(","), CONTENDERS)
    if chosen.rounds < 2:
        parser.error(f"--rounds {chosen.rounds}: a spread needs at least 2")
    if not any(chosen.only in name for name in (*(case.name for case in CASES), UNET)):
        parser.error(f"no case contains {chosen.only!r}; --list shows them")
    if not chosen.list and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --list works without one")
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    cases = [case for case in CASES if chosen.only in case.name]
    if chosen.list:
        print("\n".join([*(f"{c.name:45} {c.operations / 1e9:8.1f} GFLOP" for c in cases), UNET]))
        return
    if chosen.tune:
        from bitpolicy.kernels.triton.configs import tune

        tune()
    names, ceiling, results = chosen.contenders.split(","), ceilings(), []
    for case in cases:
        results.append(measured(case.name, *layer_of(case), names, chosen.rounds) | {"layer": asdict(case)})
        print("\n".join(described(results[-1], case.operations, ceiling)), flush=True)
    if chosen.only in UNET:
        quick = [
            name for name in names if name != "torchao-int8"
        ]  # its tuning of a whole model takes longer than everything else
        results.append(measured(UNET, *unet_of_sdxl(), quick, chosen.rounds))
        print("\n".join(described(results[-1], None, ceiling)), flush=True)
    if chosen.json:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        found = {"machine": machine, "ceiling_per_second": ceiling, "tuned": chosen.tune, "results": results}
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
