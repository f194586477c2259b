"""A third-party model to try: the terrain U-Net of the package `adaptive-terrain-diffusion` as a diffusers pipeline.

The wheel (MIT, 39 MB) contains a consistency model (Song et al. 2023) of 10.4 million parameters. For a given
difficulty it draws height fields of 128 x 128, one channel. This script converts it into a `ConsistencyModelPipeline`:
class label i, 0 to 99, is difficulty i + 1, and `heights` converts an image in [0, 1] to metres.

    python scripts/make_terrain.py terrain                 # downloads the wheel
    python scripts/make_terrain.py terrain --source FILE   # a wheel, the .onnx, or a folder with either
    python scripts/make_terrain.py terrain --picture terrain.png

The weights fit float16, but the activations do not: they reach 5e10 in the last resnets, until the last norm rescales
them. Compute in float32 or bfloat16.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from onnx_weights import Graph, read_graph
from PIL import Image

PACKAGE, VERSION = "adaptive-terrain-diffusion", "0.4.2"
ONNX = "terrain_consistency_unet_difficulty100.onnx"
CLASSES = 100
CELL = 0.1  # metres between two heights
_HIGHEST, _ASINH = 22.16864013671875, 0.1  # constants of the package's own scaling of heights
_RESNET, _ATTENTION = "ResnetDownsampleBlock2D", "AttnDownBlock2D"
CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 32, 64, 96, 128),
    "layers_per_block": 4,
    "down_block_types": (_RESNET, _RESNET, _ATTENTION, _ATTENTION, _ATTENTION),
    "up_block_types": (*("AttnUpBlock2D",) * 3, *("ResnetUpsampleBlock2D",) * 2),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 32,
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
    "norm_eps": 1e-5,
    "num_class_embeds": CLASSES,
}
# The network was distilled for its first step. Below about sigma 5 it leaves noise in the image, also in the package's
# own code. rho 1 spaces the sigmas of several steps evenly and so keeps them where the network works: 80, 59, 39, 18
# for four steps. With the usual rho 7, the last of four would be 0.13.
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 40,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "rho": 1.0,
    "clip_denoised": True,
}
Weights = dict[str, np.ndarray]


def onnx_bytes(source: Path) -> bytes:
    """The network from a wheel, from an .onnx file, or from a folder that contains either."""
    if source.is_dir():
        found = [*sorted(source.rglob(ONNX)), *sorted(source.glob("adaptive_terrain_diffusion-*.whl"))]
        if not found:
            raise SystemExit(f"{source} contains neither {ONNX} nor the wheel of {PACKAGE}")
        source = found[0]
    if source.suffix != ".whl":
        return source.read_bytes()
    with zipfile.ZipFile(source) as wheel:
        return wheel.read(next(name for name in wheel.namelist() if name.endswith(f"/{ONNX}")))


def downloaded() -> bytes:
    """The network, downloaded from the package index that pip is configured for."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, f"{PACKAGE}=={VERSION}"], check=True)
        return onnx_bytes(Path(folder))


# The weights, under the names of the original network

_NORM_BEFORE = {  # suffix of a convolution's name -> suffix of the name of the norm before it
    ".in_layers.2.weight": ".in_layers.0",
    ".out_layers.3.weight": ".out_layers.0",
    ".qkv.weight": ".norm",
    "out.2.weight": "out.0",
}


def original_weights(graph: Graph) -> Weights:
    """The original PyTorch state dict, including the norms' weights, which the exporter stored as unnamed constants."""
    named = {name: value for name, value in graph.constants.items() if name.startswith("network.")}
    weights = {name.removeprefix("network."): value for name, value in named.items()}
    for node in graph.nodes.values():
        name = node.inputs[1].removeprefix("network.") if node.op == "Conv" else ""
        for end, norm in _NORM_BEFORE.items():
            if name.endswith(end):
                weight, bias = _affine_before(graph, node.inputs[0])
                weights[f"{name.removesuffix(end)}{norm}.weight"] = weight
                weights[f"{name.removesuffix(end)}{norm}.bias"] = bias
                break
    return weights


def _affine_before(graph: Graph, at: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of the norm before `at`, found by going back through activation, resampling, scale and shift."""
    while not _adds_a_bias(graph, at):
        at = graph.nodes[at].inputs[0]
    scaled, bias = graph.nodes[at].inputs
    multiplied = graph.nodes[scaled]
    if multiplied.op != "Mul":
        raise ValueError(f"{at}: expected Mul before Add, found {multiplied.op}")
    return graph.constants[multiplied.inputs[1]].reshape(-1), graph.constants[bias].reshape(-1)


def _adds_a_bias(graph: Graph, at: str) -> bool:
    node = graph.nodes[at]
    constant = graph.constants.get(node.inputs[1]) if node.op == "Add" else None
    return constant is not None and constant.ndim == 3


# The weights, under the names of diffusers


class Renaming:
    """Moves weights from the original names to those of diffusers; none may be left over."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self._left, self._named = dict(weights), {}  # type: Weights, Weights

    def finished(self) -> dict[str, torch.Tensor]:
        """Raises:
        ValueError: a weight has no place in diffusers' network.
        """
        if self._left:
            raise ValueError(f"weights without a place: {', '.join(sorted(self._left))}")
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in self._named.items()}

    def move(self, old: str, new: str, flat: bool = False) -> None:
        """Move a weight and its bias; `flat` turns a convolution with kernel size 1 into a linear layer."""
        for end in (".weight", ".bias"):
            value = self._left.pop(old + end)
            self._named[new + end] = value.reshape(len(value), -1) if flat and end == ".weight" else value

    def resnet(self, old: str, new: str) -> None:
        parts = {
            "in_layers.0": "norm1",
            "in_layers.2": "conv1",
            "emb_layers.1": "time_emb_proj",
            "out_layers.0": "norm2",
            "out_layers.3": "conv2",
        }
        for theirs, ours in parts.items():
            self.move(f"{old}.{theirs}", f"{new}.{ours}")
        if f"{old}.skip_connection.weight" in self._left:
            self.move(f"{old}.skip_connection", f"{new}.conv_shortcut")

    def attention(self, old: str, new: str) -> None:
        self.move(f"{old}.norm", f"{new}.group_norm")
        self.move(f"{old}.proj_out", f"{new}.to_out.0", flat=True)
        for end in (".weight", ".bias"):
            for name, part in zip("qkv", np.split(self._left.pop(f"{old}.qkv{end}"), 3), strict=True):
                self._named[f"{new}.to_{name}{end}"] = part.reshape(len(part), -1) if end == ".weight" else part

    def classes(self) -> None:
        """Tabulate the original's two-layer network at the difficulties 0, 1/99, ..., 1."""
        level = np.linspace(0, 1, CLASSES, dtype=np.float32).astype(np.float64)[:, None]
        first, last = ((self._pop(f"label_emb.{i}.weight"), self._pop(f"label_emb.{i}.bias")) for i in (0, 2))
        hidden = level @ first[0].T + first[1]
        hidden = hidden / (1 + np.exp(-hidden))
        self._named["class_embedding.weight"] = (hidden @ last[0].T + last[1]).astype(np.float32)

    def _pop(self, name: str) -> np.ndarray:
        return self._left.pop(name).astype(np.float64)


def diffusers_weights(weights: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The state dict of `UNet2DModel(**CONFIG)`."""
    renaming = Renaming(weights)
    renaming.classes()
    renaming.move("time_embed.0", "time_embedding.linear_1")
    renaming.move("time_embed.2", "time_embedding.linear_2")
    renaming.move("input_blocks.0.0", "conv_in")
    _move_down_blocks(renaming)
    renaming.resnet("middle_block.0", "mid_block.resnets.0")
    renaming.attention("middle_block.1", "mid_block.attentions.0")
    renaming.resnet("middle_block.2", "mid_block.resnets.1")
    _move_up_blocks(renaming)
    renaming.move("out.0", "conv_norm_out")
    renaming.move("out.2", "conv_out")
    return renaming.finished()


def _move_down_blocks(renaming: Renaming) -> None:
    at, kinds = 1, CONFIG["down_block_types"]
    for level, kind in enumerate(kinds):
        for layer in range(CONFIG["layers_per_block"]):
            renaming.resnet(f"input_blocks.{at}.0", f"down_blocks.{level}.resnets.{layer}")
            if kind == _ATTENTION:
                renaming.attention(f"input_blocks.{at}.1", f"down_blocks.{level}.attentions.{layer}")
            at += 1
        if level < len(kinds) - 1:
            renaming.resnet(f"input_blocks.{at}.0", f"down_blocks.{level}.downsamplers.0")
            at += 1


def _move_up_blocks(renaming: Renaming) -> None:
    at, kinds = 0, CONFIG["up_block_types"]
    for level, kind in enumerate(kinds):
        attentive = kind.startswith("Attn")
        for layer in range(CONFIG["layers_per_block"] + 1):
            renaming.resnet(f"output_blocks.{at}.0", f"up_blocks.{level}.resnets.{layer}")
            if attentive:
                renaming.attention(f"output_blocks.{at}.1", f"up_blocks.{level}.attentions.{layer}")
            at += 1
        if level < len(kinds) - 1:
            renaming.resnet(f"output_blocks.{at - 1}.{1 + attentive}", f"up_blocks.{level}.upsamplers.0")


def pipeline(data: bytes) -> ConsistencyModelPipeline:
    """The pipeline with the network of an ONNX file, in float32."""
    unet = UNet2DModel(**CONFIG).eval()
    unet.load_state_dict(diffusers_weights(original_weights(read_graph(data))), strict=True)
    return ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler(**SCHEDULER))


# Pictures


def heights(image: np.ndarray) -> np.ndarray:
    """Convert an image in [0, 1] to metres."""
    return _ASINH * np.sinh(np.clip(image, 0, 1) * math.asinh(_HIGHEST / _ASINH))


def shaded(height: np.ndarray) -> np.ndarray:
    """A height field (H, W) in metres as grey in [0, 1]: brighter is higher, with light from the upper left."""
    down, right = np.gradient(height, CELL)
    light = np.clip((1.5 - right - down) / np.sqrt(1 + right**2 + down**2) / math.sqrt(4.25) * 1.3, 0, 1)
    low, high = np.percentile(height, (1, 99))
    return (0.35 + 0.65 * np.clip((height - low) / (high - low), 0, 1)) * light


def save_picture(pipe: Any, path: Path, labels: tuple[int, ...] = (0, 24, 49, 74, 99)) -> None:
    """One row for each of two seeds, one column for each difficulty."""
    rows = []
    for seed in (3, 4):
        generator = torch.Generator().manual_seed(seed)
        about = {"num_inference_steps": 1, "generator": generator, "output_type": "np"}
        images = pipe(batch_size=len(labels), class_labels=list(labels), **about).images[..., 0]
        rows.append(np.hstack([np.pad(shaded(heights(image)), 2, constant_values=1) for image in images]))
    Image.fromarray((np.vstack(rows) * 255).round().astype(np.uint8)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write the pipeline to")
    parser.add_argument("--source", type=Path, help="a wheel, an .onnx file, or a folder with either")
    parser.add_argument("--picture", type=Path, help="draw ten samples into this PNG")
    options = parser.parse_args()
    pipe: Any = pipeline(onnx_bytes(options.source) if options.source else downloaded())
    if options.picture:
        save_picture(pipe, options.picture)
    pipe.unet.to(torch.float16)
    pipe.save_pretrained(options.output, safe_serialization=True)
    parameters = sum(parameter.numel() for parameter in pipe.unet.parameters())
    print(f"{options.output}: {type(pipe).__name__}, {parameters:,} parameters in float16")


if __name__ == "__main__":
    main()
