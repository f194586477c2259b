"""SDNQ: uniform settings from 3 to 8 bits, and its dynamic mode with a sweep of the threshold.

Uniform settings combine the dtypes with group sizes, Hadamard rotation, low-rank correction, codebooks,
double-quantized scales and the precision of the scales. The dynamic mode starts from a lowest dtype and widens each
layer until its relative weight error is below a threshold. Bisection finds the smallest threshold whose file still fits
each budget. Bytes are those of the file that the tool saves. The weights are the tool's own dequantization of that file
in float32. Needs sdnq==0.2.8.

    build/peers/venv-sdnq/bin/python scripts/peers/with_sdnq.py --check 2
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"

import torch
from entry import OWN_FILE, SHARES, Entry, tensor_bytes, tool_arguments, write_entry
from own_model import agreement, fp16_denoiser
from sdnq import load_sdnq_model, quantizer, save_sdnq_model, sdnq_post_load_quant
from sdnq.dequantizer import dequantize_sdnq_model
from torch import nn

BITS = (3, 4, 5, 6, 7, 8)
FLOATS = ("float4_e2m1fn", "float5_e2m2fn", "float6_e2m3fn", "float7_e2m4fn")
COVERAGE: dict[str, dict[str, Any]] = {"": {}, "-all": {"minimum_allowed_numel": 1024}}  # default: at least 16384
DYNAMIC = tuple(itertools.product(((0, 0), (128, 128), (0, 128), (128, 0)), ("-all", ""), ("int4", "uint4", "uint2")))
SMALLEST_SHARE = 0.88  # of a budget; a uniform setting that uses less of it is not its best
_FINEST = 3e-7  # a threshold at which all relevant dtypes have been tried


def uniform_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, options) of every uniform setting."""
    for cover, small in COVERAGE.items():
        for setting, options in itertools.chain(_plain_settings(), _corrected_settings(), _codebook_settings()):
            yield setting + cover, {**options, **small}


def _plain_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    dtypes = [f"{sign}int{bits}" for bits in BITS for sign in ("", "u")] + [*FLOATS]
    for dtype, group, rotated, wide in itertools.product(dtypes, (0, 128, 64, 32, 16, -1), (0, 128), (True, False)):
        options = {"weights_dtype": dtype, "group_size": group, "dequantize_fp32": wide, **_rotation(rotated)}
        yield f"{dtype}-g{group}-h{rotated}-{'fp32' if wide else 'fp16'}", options
    for dtype, group, rotated in itertools.product([f"uint{b}" for b in BITS], (16, 32, 64), (0, 128)):
        options = {"weights_dtype": dtype, "group_size": group, "scale_dtype": "uint8", **_rotation(rotated)}
        yield f"{dtype}-g{group}-h{rotated}-scale8", options


def _corrected_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    for bits, group, rank in itertools.product(BITS[:-1], (0, 128, -1), (4, 8, 16, 32)):
        options = {"group_size": group, "dequantize_fp32": False, "use_svd": True, "svd_rank": rank}
        yield f"int{bits}-g{group}-svd{rank}", {"weights_dtype": f"int{bits}", **options}


def _codebook_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    for bits, group, scale, rotated in itertools.product((3, 4, 5, 6), (-1, -2), (None, "uint8"), (0, 128)):
        options = {
            "group_size": group,
            "use_codebook": True,
            "scale_dtype": scale,
            "dequantize_fp32": scale is not None,
        }
        name = f"uint{bits}-g{group}-h{rotated}-codebook-{scale or 'fp16'}"
        yield name, {"weights_dtype": f"uint{bits}", **options, **_rotation(rotated)}


def _rotation(group: int) -> dict[str, Any]:
    return {"use_hadamard": True, "hadamard_group_size": group} if group else {}


def quantized(model: Path, options: dict[str, Any]) -> nn.Module:
    """The denoiser, quantized by the tool from its FP16 values."""
    torch.manual_seed(0)  # the low-rank correction is randomized
    return sdnq_post_load_quant(
        fp16_denoiser(model, torch.float16), torch_dtype=torch.float16, quant_conv=True, **options
    )


def held_bytes(denoiser: nn.Module) -> int:
    """Bytes of its tensors, which its file will have too."""
    return sum(tensor.numel() * tensor.element_size() for tensor in denoiser.state_dict().values())


def saved(args: argparse.Namespace, denoiser: nn.Module, entry: Entry) -> None:
    """Write the tool's file, read it back in float32 and write the entry with its effective weights."""
    with tempfile.TemporaryDirectory() as folder:
        save_sdnq_model(denoiser, folder)
        nbytes = tensor_bytes(Path(folder))
        assert nbytes == held_bytes(denoiser)
        weights = dequantize_sdnq_model(load_sdnq_model(folder, dtype=torch.float32)).state_dict()
        settings = {**entry.settings, "quant_conv": True}
        if args.check:
            own = _float32(load_sdnq_model(folder, dtype=torch.float32))
            settings["own_model"] = agreement(args.model, args.work, own, weights, args.check)
        write_entry(args.work / "candidates", replace(entry, nbytes=nbytes, settings=settings), weights)


def _float32(denoiser: nn.Module) -> nn.Module:
    """Convert biases and unquantized layers to float32, which the tool leaves at FP16 when it loads for float32."""
    for name, parameter in denoiser.named_parameters():
        layer = denoiser.get_submodule(name.rpartition(".")[0])
        if not hasattr(layer, "sdnq_dequantizer") or name.endswith(".bias"):
            parameter.data = parameter.data.float()
    return denoiser


def wanted_entry(args: argparse.Namespace, name: str) -> bool:
    """Whether an entry is requested and does not exist yet."""
    return fnmatch(name, args.only) and not (args.work / "candidates" / name / "entry.json").is_file()


def make_uniform(args: argparse.Namespace, reference: int) -> None:
    for setting, options in uniform_settings():
        name = f"sdnq-{setting}"
        if not wanted_entry(args, name):
            continue
        denoiser = quantized(args.model, options)
        share = held_bytes(denoiser) / reference
        if any(SMALLEST_SHARE * limit < share <= limit for limit in SHARES):
            saved(args, denoiser, Entry(name, "SDNQ uniform", "tool", 0, OWN_FILE, "uniform", None, options))
            print(f"{name:44} {share:6.1%}", flush=True)


def make_dynamic(args: argparse.Namespace, reference: int) -> None:
    for (group, rotated), cover, lowest in DYNAMIC:
        setting = f"sdnq-dynamic-{lowest}-g{group}-h{rotated}{cover}"
        wanted = [share for share in SHARES if wanted_entry(args, f"{setting}@{share:.2f}")]
        options = {"weights_dtype": lowest, "group_size": group, "dequantize_fp32": False}
        options |= {"use_dynamic_quantization": True, **_rotation(rotated), **COVERAGE[cover]}
        with remembered_layers() as tried:
            if wanted:
                quantized(args.model, {**options, "dynamic_loss_threshold": _FINEST})
            for share in wanted:
                _dynamic_at(args, share, share * reference, setting, options, tried)


def _dynamic_at(
    args: argparse.Namespace, share: float, limit: float, setting: str, options: dict[str, Any], tried: list[float]
) -> None:
    """Save the entry of the smallest threshold that fits, found by bisection over the observed losses, if any fits."""
    thresholds = sorted(tried)
    low, high, best = 0, len(thresholds) - 1, None
    while low <= high:
        middle = (low + high) // 2
        denoiser = quantized(args.model, {**options, "dynamic_loss_threshold": thresholds[middle]})
        if held_bytes(denoiser) <= limit:
            high, best = middle - 1, (thresholds[middle], denoiser)
        else:
            low = middle + 1
    if best is None:
        return
    threshold, denoiser = best
    widths = {dtype: len(layers) for dtype, layers in denoiser.quantization_config.modules_dtype_dict.items()}
    settings = {**options, "dynamic_loss_threshold": threshold, "layers": widths}
    saved(args, denoiser, Entry(f"{setting}@{share:.2f}", "SDNQ dynamic", "tool", 0, OWN_FILE, "SDNQ", share, settings))
    print(f"{setting}@{share:.2f} threshold {threshold:.2e} {widths}", flush=True)


@contextmanager
def remembered_layers() -> Iterator[list[float]]:
    """Cache the layers that the dynamic mode quantizes in one dtype after another, for use with other thresholds.

    Yields:
        Every loss that was compared with a threshold so far.
    """
    quantize, compare = quantizer.sdnq_quantize_layer_weight, torch.nn.functional.mse_loss
    seen: dict[tuple[str, str], Any] = {}
    losses: dict[tuple[str, str], torch.Tensor] = {}
    relative: list[float] = []
    latest = ("", "")

    def once(weight: torch.Tensor, **options: Any) -> tuple[Any, dict[str, torch.Tensor | None]]:
        nonlocal latest
        latest = (options["param_name"], options["weights_dtype"])
        if latest not in seen:
            seen[latest] = quantize(weight, **options)
        dequantizer, tensors = seen[latest]
        return dequantizer, dict(tensors)

    def compared(original: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if latest not in losses:
            losses[latest] = compare(original, other)
            relative.append(float(losses[latest] / original.std().square().clamp(min=1e-8)) * (1 + 1e-6))
        return losses[latest].clone()

    quantizer.sdnq_quantize_layer_weight, torch.nn.functional.mse_loss = once, compared
    try:
        yield relative
    finally:
        quantizer.sdnq_quantize_layer_weight, torch.nn.functional.mse_loss = quantize, compare


def main() -> None:
    args = tool_arguments(__doc__)
    torch.set_num_threads(1)
    reference = held_bytes(fp16_denoiser(args.model, torch.float16))
    make_dynamic(args, reference)
    make_uniform(args, reference)


if __name__ == "__main__":
    main()
