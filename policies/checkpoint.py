"""The files of one packed model: its tensors, in one file or in shards, and its config."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpolicy.kernels.format import TensorSpec
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.accounting import stored_spec
from bitpolicy.policies.apply import quantize_layer
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.packed_config import BitPolicyConfig
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.safetensors_writer import SafetensorsWriter

WEIGHTS = "diffusion_pytorch_model"
MAX_SHARD_SIZE = 10 * 10**9  # bytes; diffusers' default


def checkpoint_bytes(folder: Path) -> int:
    """Tensor bytes of the safetensors files in a denoiser's folder, as their headers tell."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(
            end - start
            for name, entry in header.items()
            if name != "__metadata__"
            for start, end in [entry["data_offsets"]]
        )
    return total


def export_denoiser(
    denoiser: nn.Module,
    choices: Mapping[str, Choice],
    calibration: Calibration,
    storage: torch.dtype,
    folder: Path,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> int:
    """Write the config and the packed weights of one denoiser; returns its tensor bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    checksums = write_packed(denoiser, choices, calibration, storage, folder, WEIGHTS, max_shard_size)
    write_config(denoiser, choices, storage, folder, checksums)
    return checkpoint_bytes(folder)


def write_packed(
    model: nn.Module,
    choices: Mapping[str, Choice],
    calibration: Calibration,
    storage: torch.dtype,
    folder: Path,
    stem: str,
    max_shard_size: int = MAX_SHARD_SIZE,
    left_out: Collection[str] = (),
) -> str:
    """Write the tensors of a model to `folder`, in `stem`.safetensors or in shards with an index.

    Args:
        left_out: names of tensors that are another under a second name.

    Returns:
        Checksums of the tensors, as a `BitPolicyConfig` takes them.
    """
    specs = {name: spec for name, spec in _specs(model, choices, storage).items() if name not in left_out}
    shards = _shards(specs, max_shard_size, stem)
    with ExitStack() as files:
        place: dict[str, SafetensorsWriter] = {}
        for file, names in shards.items():
            writer = files.enter_context(SafetensorsWriter(folder / file, {name: specs[name] for name in names}))
            place |= dict.fromkeys(names, writer)
        for name, tensor in _tensors(model, choices, calibration, storage):
            if name not in left_out:
                place[name].write(name, tensor)
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: f for f, names in shards.items() for n in names}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return "".join(place[name].checksums[name] for name in sorted(specs))


def _packed_name(name: str, choices: Mapping[str, Choice]) -> str | None:
    """The layer whose packed tensors stand for state-dict entry `name`, or None."""
    layer, _, leaf = name.rpartition(".")
    return layer if leaf == "weight" and layer in choices and choices[layer].format.packed else None


def _specs(denoiser: nn.Module, choices: Mapping[str, Choice], storage: torch.dtype) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for name, tensor in denoiser.state_dict().items():
        layer = _packed_name(name, choices)
        if layer is None:
            specs[name] = stored_spec(tensor, storage)
        else:
            stored = choices[layer].format.tensors(tensor.shape, storage)
            specs |= {f"{layer}.{suffix}": spec for suffix, spec in stored.items()}
    return specs


def _tensors(
    denoiser: nn.Module, choices: Mapping[str, Choice], calibration: Calibration, storage: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every stored tensor, one layer in memory at a time."""
    done = set()
    for name, layer in quantizable_layers(denoiser):
        if name in choices and choices[name].format.packed:
            stored = quantize_layer(name, layer, choices[name], calibration, storage)
            done.add(f"{name}.weight")
            for suffix, tensor in stored.tensors.items():
                yield f"{name}.{suffix}", tensor
            if stored.bias is not None:
                done.add(f"{name}.bias")
                yield f"{name}.bias", stored.bias
    for name, tensor in denoiser.state_dict().items():
        if name not in done:
            yield name, tensor.to(stored_spec(tensor, storage).dtype)


def _shards(specs: Mapping[str, TensorSpec], most: int, stem: str) -> dict[str, list[str]]:
    """File name -> tensor names, filled in name order, none over `most` bytes unless one tensor is."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in sorted(specs.items()):
        if groups[-1] and size + spec.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_config(
    denoiser: Any,
    choices: Mapping[str, Choice],
    storage: torch.dtype,
    folder: Path,
    checksums: str = "",
) -> None:
    denoiser.save_config(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = BitPolicyConfig.of(choices, storage, checksums).to_dict()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
