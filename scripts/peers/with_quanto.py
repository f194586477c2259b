"""optimum-quanto: qint4 and qint8 for linear layers and convolutions, with either of its two ways to choose ranges.

The tool chooses the groups (128, or 96, 64, 32 if those divide a row). `-kept` excludes the timestep embedding, the
input stem and the output head. The denoiser is quantized and saved in FP16. Bytes are those of the saved safetensors.
The weights are the saved codes times the saved scales, multiplied in float32 by the tool's own tensors. With `-fp32`,
the model is quantized in float32 and keeps float32 scales. Needs optimum-quanto==0.2.7.

    build/peers/venv-quanto/bin/python scripts/peers/with_quanto.py --check 2
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from entry import OWN_FILE, Entry, tensor_bytes, tool_arguments, write_entry
from optimum.quanto import HqqOptimizer, QTensor, freeze, qint4, qint8, quantize
from own_model import agreement, fp16_denoiser, kept_layers
from safetensors.torch import save_file
from torch import nn

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def quantized(model: Path, dtype: torch.dtype, bits: Any, hqq: bool, kept: tuple[str, ...]) -> nn.Module:
    denoiser = fp16_denoiser(model, dtype)
    quantize(denoiser, weights=bits, optimizer=HqqOptimizer() if hqq else None, exclude=list(kept) or None)
    freeze(denoiser)
    return denoiser


def in_float32(denoiser: nn.Module) -> nn.Module:
    """The same model with the same scales, biases and norms in float32, so that it computes in float32."""
    for module in denoiser.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            held = parameter.data if not isinstance(parameter, QTensor) else _wide(parameter)
            plain = held if isinstance(held, QTensor) else held.float()
            setattr(module, name, nn.Parameter(plain, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.float() if buffer.is_floating_point() else buffer)
    return denoiser


def _wide(weight: QTensor) -> QTensor:
    """A quantized tensor with its scale (and shift) in float32."""
    names, about = weight.__tensor_flatten__()
    inner = {name: getattr(weight, name) for name in names}
    inner |= {name: inner[name].float() for name in names if name in ("_scale", "_shift")}
    return type(weight).__tensor_unflatten__(inner, about, weight.size(), weight.stride())


def effective(denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """The plain denoiser's state dict."""
    weights: dict[str, torch.Tensor] = {}
    for path, module in denoiser.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            held = parameter.data if not isinstance(parameter, QTensor) else parameter.dequantize()
            weights[f"{path}.{name}"] = held
    return weights


def make(args: argparse.Namespace, bits: Any, hqq: bool, scales: str, kept: tuple[str, ...]) -> None:
    name = f"quanto-{bits.name}-{scales}{'-hqq' if hqq else ''}{'-kept' if kept else ''}"
    if not fnmatch(name, args.only):
        return
    denoiser = quantized(args.model, DTYPES[scales], bits, hqq, kept)
    with tempfile.TemporaryDirectory() as folder:
        state = {key: value.contiguous() for key, value in denoiser.state_dict().items()}
        plain = {k: v.half() if scales == "fp32" and not _of_code(k) else v for k, v in state.items()}
        save_file(plain, Path(folder) / "denoiser.safetensors")
        nbytes = tensor_bytes(Path(folder))
    own = in_float32(denoiser)
    weights = effective(own)
    found = {"own_model": agreement(args.model, args.work, own, weights, args.check)} if args.check else {}
    settings = {"weights": bits.name, "optimizer": "hqq" if hqq else "max", "scales": scales, "exclude": list(kept)}
    entry = Entry(name, "optimum-quanto", "tool", nbytes, OWN_FILE, "uniform", None, {**settings, **found})
    write_entry(args.work / "candidates", entry, weights)
    print(f"{name:32} {nbytes:,} bytes {found}", flush=True)


def _of_code(key: str) -> bool:
    """Whether a saved tensor belongs to a quantized weight, which keeps its original dtype."""
    return "._" in key


def main() -> None:
    args = tool_arguments(__doc__)
    torch.set_num_threads(1)
    alone = tuple(kept_layers(args.work))
    for bits, hqq, scales, kept in itertools.product((qint4, qint8), (False, True), DTYPES, ((), alone)):
        if not (hqq and bits is qint8):
            make(args, bits, hqq, scales, kept)


if __name__ == "__main__":
    main()
