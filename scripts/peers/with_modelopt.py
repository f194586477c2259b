"""NVIDIA modelopt: auto_quantize with gradient scores, weights only.

Its score of a layer in a format is the sum of squares of (gradient of the loss at the layer's output) times (change of
that output). A denoiser has no loss of its own at inference, and the gradient of a mean squared error is tiny. So the
loss here is a random projection: the sum of the predicted noise times a standard normal vector, drawn for each batch.
Its square is an unbiased estimate of the change of the whole prediction. Formats are 4, 6 and 8 bits or 4 and 8 bits,
plus FP16, with a scale for each output channel or for each block of input channels. Each format's `effective_bits`
include its scales. modelopt cannot write a file with mixed convolutions, so the bytes are accounted: codes packed
without padding, scales at FP16. The `effective_bits` of the search are corrected until these bytes fit closely, and the
bits that were reached are recorded. The 4/8 assignment is written a second time, fitted to our formats' bytes, to
compare assignments alone. Needs nvidia-modelopt==0.47.0.

    build/peers/venv-modelopt/bin/python scripts/peers/with_modelopt.py --check 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from entry import ACCOUNTED, SHARES, Entry, tool_arguments, write_entry
from own_model import OUTPUT, agreement, call, fp16_denoiser
from safetensors.torch import load_file
from torch import nn

WIDTHS = ((4, 6, 8), (4, 8))
BLOCKS = (32, 64, 0)  # input channels that share a scale; 0 means one scale per output channel
METHODS = ("max", "mse")
_ALONG = "along"
_BATCH, _CALIBRATION, _SCORED, _ITERATIONS = 8, 4, 40, 7
_CLOSE = 1.5e-3  # the largest share of the budget that may stay unused


@dataclass(frozen=True)
class Setting:
    """One search space."""

    widths: tuple[int, ...]
    block: int
    method: str

    @property
    def name(self) -> str:
        block = f"b{self.block}" if self.block else "channel"
        return f"modelopt-{''.join(map(str, self.widths))}-{block}-{self.method}"

    def formats(self) -> list[dict[str, Any]]:
        return [self._format(bits) for bits in self.widths]

    def _format(self, bits: int) -> dict[str, Any]:
        off = {"quantizer_name": "*", "enable": False}
        shared = {"block_sizes": {1: self.block, "type": "static"}} if self.block else {"axis": 0}
        on = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, **shared}}
        effective = bits + (16 / self.block if self.block else 0.02)
        return {"quant_cfg": [off, on], "algorithm": self.method, "effective_bits": effective}


def batches(work: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Denoiser calls of the calibration samples, shuffled, each batch with its projection."""
    calls = load_file(work / "calls.safetensors")
    stream = torch.Generator().manual_seed(47)
    order = torch.randperm(len(calls["timestep"]), generator=stream)
    for rows in order.split(_BATCH):
        part = {key: value[rows] for key, value in calls.items()}
        yield {**part, _ALONG: torch.randn(part[OUTPUT].shape, generator=stream)}


def forward(denoiser: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return call(denoiser, {name: tensor for name, tensor in batch.items() if name != _ALONG})


def searched(args: argparse.Namespace, setting: Setting, bits: float) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser that auto_quantize returns, and the state of its search; scores are stored between calls."""
    torch.manual_seed(0)
    data = list(itertools.islice(batches(args.work), _SCORED))
    scores = args.work / "modelopt" / f"{setting.name}.pth"
    scores.parent.mkdir(exist_ok=True)
    finished = scores.with_suffix(".finished")
    if not finished.exists():
        scores.unlink(missing_ok=True)  # the tool cannot resume from incomplete scores of a killed run
    denoiser, state = mtq.auto_quantize(
        fp16_denoiser(args.model, torch.float32),
        constraints={"effective_bits": bits},
        quantization_formats=setting.formats(),
        data_loader=data,
        forward_step=forward,
        loss_func=lambda output, batch: (output * batch[_ALONG]).sum(),
        num_calib_steps=_CALIBRATION,
        num_score_steps=len(data),
        checkpoint=str(scores),
        verbose=False,
    )
    finished.touch()
    return denoiser, state


def layer_bits(denoiser: nn.Module) -> dict[str, int]:
    """Bit width of every quantizable layer, 16 if its quantizer is off."""
    found = {}
    for name, module in denoiser.named_modules():
        if hasattr(module, "weight_quantizer"):
            found[name] = module.weight_quantizer.num_bits if module.weight_quantizer.is_enabled else 16
    return found


def tool_bytes(denoiser: nn.Module) -> int:
    """Bytes of packed codes and FP16 scales, with everything else in FP16."""
    total = 0
    quantized = {name for name, bits in layer_bits(denoiser).items() if bits < 16}
    for name, parameter in denoiser.named_parameters():
        layer = denoiser.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and name.removesuffix(".weight") in quantized:
            quantizer = layer.weight_quantizer
            total += math.ceil(parameter.numel() * quantizer.num_bits / 8) + 2 * quantizer.amax.numel()
        else:
            total += 2 * parameter.numel()
    return total


def our_bytes(denoiser: nn.Module) -> int:
    """Bytes of the same assignment in our int4 (groups of 64), int8 and FP16; writing the entry checks them exactly."""
    bits, total = layer_bits(denoiser), 0
    for name, parameter in denoiser.named_parameters():
        width = bits.get(name.removesuffix(".weight"), 16) if name.endswith(".weight") else 16
        out, row = parameter.shape[0], parameter[0].numel()
        packed = {
            4: out * (-(-row // 2) + 3 * -(-row // 64)),
            8: parameter.numel() + 4 * out,
            16: 2 * parameter.numel(),
        }
        total += packed[width]
    return total


def fitted(
    args: argparse.Namespace, setting: Setting, limit: float, size: Callable[[nn.Module], int]
) -> tuple[nn.Module, dict[str, Any]] | None:
    """The search with the most bytes that fit. One more requested bit adds about one bit per weight, so a few
    corrections by the difference come close. After an excess, the next request is slightly below the limit."""
    lowest = float(min(setting.widths)) + 0.021 + (16 / setting.block if setting.block else 0)
    a_bit = sum(parameter.numel() for parameter in fp16_denoiser(args.model, torch.float16).parameters()) / 8
    bits, most, best = max(lowest, limit / a_bit - 0.5), -1, None
    for _ in range(_ITERATIONS):
        denoiser, state = searched(args, setting, bits)
        nbytes = size(denoiser)
        if most < nbytes <= limit:
            most, best = nbytes, (denoiser, {"asked_bits": bits, **reached(state)})
        missing = limit - nbytes
        if 0 <= missing < _CLOSE * limit or (missing < 0 and bits == lowest):
            break
        bits = max(lowest, bits + (missing if missing > 0 else missing - _CLOSE * limit / 2) / a_bit)
    return best


def reached(state: dict[str, Any]) -> dict[str, Any]:
    """What the search reports to have reached."""
    best = state["best"]
    return {
        "reached": {key: float(value) for key, value in best["constraints"].items()},
        "satisfied": best["is_satisfied"],
    }


def effective(denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """The plain denoiser's state dict, each weight after its quantizer."""
    weights = {name: parameter.detach() for name, parameter in denoiser.named_parameters()}
    with torch.no_grad():
        for name, bits in layer_bits(denoiser).items():
            if bits < 16:
                layer = denoiser.get_submodule(name)
                weights[f"{name}.weight"] = layer.weight_quantizer(layer.weight)
    return weights


def make(args: argparse.Namespace, setting: Setting, share: float, reference: int) -> None:
    name = f"{setting.name}@{share:.2f}"
    if not fnmatch(name, args.only) or (args.work / "candidates" / name / "entry.json").is_file():
        return
    best = fitted(args, setting, share * reference, tool_bytes)
    if best is None:
        return
    denoiser, found = best
    weights, nbytes = effective(denoiser), tool_bytes(denoiser)
    widths = list(layer_bits(denoiser).values())
    found |= {"layers": {str(bits): widths.count(bits) for bits in sorted(set(widths))}, "method": setting.method}
    found |= {"own_model": agreement(args.model, args.work, denoiser, weights, args.check)} if args.check else {}
    entry = Entry(name, "modelopt", "tool", nbytes, ACCOUNTED, "modelopt auto_quantize", share, found)
    write_entry(args.work / "candidates", entry, weights)
    print(f"{name:36} {nbytes / reference:6.2%} {found}", flush=True)


def hand_over(args: argparse.Namespace, setting: Setting, share: float, reference: int) -> None:
    """Write only the assignment, as wide as the bytes of our formats allow."""
    if not fnmatch(f"assignment-{setting.name}@{share:.2f}", args.only):
        return
    best = fitted(args, setting, share * reference, our_bytes)
    if best is not None:
        place = args.work / "modelopt" / f"assignment@{share:.2f}-{setting.name}.json"
        place.write_text(json.dumps({"layers": layer_bits(best[0]), **best[1]}, indent=1) + "\n")
        print(f"{place.name} {our_bytes(best[0]) / reference:6.2%}", flush=True)


def main() -> None:
    args = tool_arguments(__doc__)
    torch.set_num_threads(1)
    reference = 2 * sum(parameter.numel() for parameter in fp16_denoiser(args.model, torch.float16).parameters())
    for method, widths, block in itertools.product(METHODS, WIDTHS, BLOCKS):
        for share in SHARES:
            make(args, Setting(widths, block, method), share, reference)
    for block, share in itertools.product((0, 64), SHARES):
        hand_over(args, Setting((4, 8), block, "max"), share, reference)


if __name__ == "__main__":
    main()
