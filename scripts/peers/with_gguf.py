"""GGUF: llama.cpp's block formats, written to a real file by the gguf package.

Blocks of 32 run along a weight's rows; a convolution's rows are (in, kh, kw) flattened. If 32 does not divide a row but
divides the whole tensor, the tensor is stored as rows of 32. ComfyUI-GGUF's converter stores convolutions in that way
too, along with their shape. Tensors that 32 does not divide stay FP16, and so do biases and norms. `-kept` leaves the
timestep embedding, the input stem and the output head at FP16. Bytes are those of the tensors in the file. The weights
come from the package's own dequantization. Needs gguf==0.19.0; torch and diffusers only read the denoiser.

    build/peers/venv-gguf/bin/python scripts/peers/with_gguf.py
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from entry import OWN_FILE, Entry, tool_arguments, write_entry
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from own_model import fp16_denoiser, kept_layers
from torch import nn

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_BLOCK = 32


def rows_of(weight: torch.Tensor) -> np.ndarray | None:
    """The weight as rows that blocks divide, float32, shape (rows, n); None if that is impossible."""
    if weight.ndim < 2 or weight.numel() % _BLOCK:
        return None
    flat = weight.float().flatten(1).numpy()
    return flat if flat.shape[1] % _BLOCK == 0 else flat.reshape(-1, _BLOCK)


def write_file(path: Path, denoiser: nn.Module, kind: GGMLQuantizationType, kept: tuple[str, ...]) -> None:
    """Write the denoiser as a GGUF file."""
    state = denoiser.state_dict()
    layers = (name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    weights = {f"{name}.weight" for name in layers}
    writer = GGUFWriter(path, "unet")
    for name, tensor in state.items():
        rows = None if name in kept or name not in weights else rows_of(tensor)
        if rows is None:
            writer.add_tensor(name, tensor.half().numpy())
        else:
            writer.add_tensor(name, quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_file(path: Path, state: dict[str, torch.Tensor]) -> tuple[int, dict[str, torch.Tensor]]:
    """Tensor bytes of a GGUF file, and its values in the shapes of `state`."""
    tensors = GGUFReader(path).tensors
    values = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).astype(np.float32)) for t in tensors}
    return sum(int(t.n_bytes) for t in tensors), {name: values[name].reshape(state[name].shape) for name in state}


def make(args: argparse.Namespace, kind: str, kept: tuple[str, ...]) -> None:
    name = f"gguf-{kind}{'-kept' if kept else ''}"
    if not fnmatch(name, args.only):
        return
    denoiser = fp16_denoiser(args.model, torch.float16)
    state = dict(denoiser.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "denoiser.gguf"
        write_file(path, denoiser, GGMLQuantizationType[kind], kept)
        nbytes, weights = read_file(path, state)
        weights = {key: value.clone() for key, value in weights.items()}
    left = sum(rows_of(t) is None for t in state.values() if t.ndim > 1)
    settings = {"type": kind, "kept": list(kept), "weights_left_fp16": left}
    write_entry(
        args.work / "candidates", Entry(name, "GGUF", "tool", nbytes, OWN_FILE, "uniform", None, settings), weights
    )
    print(f"{name:24} {nbytes:,} bytes, {left} weights at FP16 because 32 does not divide them", flush=True)


def main() -> None:
    args = tool_arguments(__doc__)
    torch.set_num_threads(1)
    alone = tuple(f"{name}.weight" for name in kept_layers(args.work))
    for kind, kept in itertools.product(TYPES, ((), alone)):
        make(args, kind, kept)


if __name__ == "__main__":
    main()
