"""The files of one packed model: its tensors, in one file or in shards, and its config."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import Quantizable, quantizable_layers
from bitpolicy.policies.apply import QuantizedLayer, as_stored, quantize_tensors
from bitpolicy.policies.finite import is_finite, require_finite, warn_of_biases, warn_of_source
from bitpolicy.policies.loading.packed_config import BitPolicyConfig
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.file_source import header
from bitpolicy.policies.storage.pipeline_files import DIFFUSERS, shard_names, weights_index
from bitpolicy.policies.storage.safetensors_writer import SafetensorsWriter
from bitpolicy.policies.storage.source import ModuleSource, TensorSource

MAX_SHARD_SIZE = 10 * 10**9  # bytes; diffusers' default


def checkpoint_bytes(folder: Path) -> int:
    """Tensor bytes of the safetensors files in a component's folder, from their headers."""
    return sum(spec.nbytes for path in sorted(folder.glob("*.safetensors")) for spec in header(path).values())


def export_diffusers_model(
    model: nn.Module,
    choices: Mapping[str, Choice],
    folder: Path,
    max_shard_size: int = MAX_SHARD_SIZE,
    source: TensorSource | None = None,
    *,
    quantization: Quantization,
) -> int:
    """Write the config and the packed weights of one diffusers model.

    Args:
        model: may be on `meta` if `source` is given.
        source: its tensors; None means those of `model`.
        quantization: its compute is that of the packed layers after loading.

    Returns:
        Tensor bytes of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checksums = write_packed(
        model,
        source or ModuleSource(model),
        choices,
        folder,
        DIFFUSERS,
        max_shard_size,
        quantization=quantization,
    )
    write_config(model, choices, quantization.storage, folder, checksums, quantization.compute)
    return checkpoint_bytes(folder)


def write_packed(
    model: nn.Module,
    source: TensorSource,
    choices: Mapping[str, Choice],
    folder: Path,
    stem: str,
    max_shard_size: int = MAX_SHARD_SIZE,
    left_out: Collection[str] = (),
    *,
    quantization: Quantization,
) -> str:
    """Write the tensors of a model to `folder`, in `stem`.safetensors or in shards with an index.

    A layer is read and quantized while the one before it is written, so at most two are in memory.

    Args:
        model: gives the layers and shapes; it may be on `meta`.
        source: its tensors.
        left_out: second names of tensors that are stored under another name.

    Returns:
        Checksums of the tensors, as a `BitPolicyConfig` takes them.
    """
    specs = {
        name: spec for name, spec in packed_specs(model, choices, quantization.storage).items() if name not in left_out
    }
    shards = _shards(specs, max_shard_size, stem)
    with ExitStack() as files:
        place: dict[str, SafetensorsWriter] = {}
        for file, names in shards.items():
            writer = files.enter_context(SafetensorsWriter(folder / file, {name: specs[name] for name in names}))
            place |= dict.fromkeys(names, writer)
        _write_behind(place, packed_tensors(model, source, choices, left_out, quantization=quantization))
    if len(shards) > 1:
        index = weights_index({file: {name: specs[name] for name in names} for file, names in shards.items()})
        (folder / f"{stem}.safetensors.index.json").write_text(index, encoding="utf-8")
    return "".join(place[name].checksums[name] for name in sorted(specs))


def _write_behind(place: Mapping[str, SafetensorsWriter], layers: Iterator[dict[str, torch.Tensor]]) -> None:
    """Write the tensors of each layer while those of the next one are made."""

    def write(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            place[name].write(name, tensor)

    with ThreadPoolExecutor(1) as thread:
        writing: Future[None] | None = None
        for tensors in layers:
            if writing is not None:
                writing.result()
            writing = thread.submit(write, tensors)
        if writing is not None:
            writing.result()


def _packed_name(name: str, choices: Mapping[str, Choice]) -> str | None:
    """The layer whose packed tensors replace the state-dict entry `name`, or None."""
    layer, _, leaf = name.rpartition(".")
    return layer if leaf == "weight" and layer in choices and choices[layer].format.packed else None


def packed_specs(model: nn.Module, choices: Mapping[str, Choice], storage: torch.dtype) -> dict[str, TensorSpec]:
    """Dtype and shape of every stored tensor, by name, known before anything is quantized."""
    specs: dict[str, TensorSpec] = {}
    for name, tensor in model.state_dict().items():
        layer = _packed_name(name, choices)
        if layer is None:
            specs[name] = TensorSpec.stored(tensor, storage)
        else:
            stored = choices[layer].format.tensors(tensor.shape, storage)
            specs |= {f"{layer}.{suffix}": spec for suffix, spec in stored.items()}
    return specs


def packed_tensors(
    model: nn.Module,
    source: TensorSource,
    choices: Mapping[str, Choice],
    left_out: Collection[str] = (),
    *,
    quantization: Quantization,
) -> Iterator[dict[str, torch.Tensor]]:
    """Every stored tensor, those of one layer at a time.

    Warns at the end, in one line each, of biases that could not be corrected and of NaN or Inf in the source.

    Raises:
        BitPolicyError: quantizing a layer would give NaN or Inf.
    """
    done, storage = set(left_out), quantization.storage
    uncorrected, not_finite = [], []
    for name, layer in quantizable_layers(model):
        if name in choices and choices[name].format.packed:
            stored = _quantized(name, layer, source, choices[name], quantization)
            made = {f"{name}.{suffix}": tensor for suffix, tensor in stored.tensors.items()}
            require_finite(name, made)
            if stored.bias is not None:
                made[f"{name}.bias"] = stored.bias
                uncorrected += [name] * stored.left_as_it_was
                not_finite += [f"{name}.bias"] * (not is_finite(stored.bias))
            done |= {f"{name}.weight", *made}
            yield made
    for name in model.state_dict():
        if name not in done:
            tensor = as_stored(name, source.read(name), storage)
            not_finite += [name] * (not is_finite(tensor))
            yield {name: tensor}
    warn_of_biases(uncorrected, storage)
    warn_of_source(not_finite)


def _quantized(
    name: str,
    layer: Quantizable,
    source: TensorSource,
    choice: Choice,
    quantization: Quantization,
) -> QuantizedLayer:
    """One layer, read from the source and quantized."""
    weight = as_stored(f"{name}.weight", source.read(f"{name}.weight"), quantization.storage)
    bias = None if layer.bias is None else source.read(f"{name}.bias")
    return quantize_tensors(name, layer, weight, bias, choice, quantization.calibration)


def _shards(specs: Mapping[str, TensorSpec], most: int, stem: str) -> dict[str, list[str]]:
    """File name -> tensor names, in name order. No file is larger than `most` bytes unless a single tensor is."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in sorted(specs.items()):
        if groups[-1] and size + spec.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.nbytes
    return dict(zip(shard_names(stem, len(groups)), groups, strict=True))


def write_config(
    model: Any,
    choices: Mapping[str, Choice],
    storage: torch.dtype,
    folder: Path,
    checksums: str = "",
    compute: Compute = Compute.EXACT,
) -> None:
    """Write the config of a diffusers model. A model without packed layers gets a `quantization_config`, too, so that
    it keeps its dtype when it is loaded without a `dtype` argument."""
    model.save_config(folder)
    config = BitPolicyConfig.of(choices, storage, checksums, compute).to_dict()
    rewrite_json(folder / "config.json", quantization_config=config)


def rewrite_json(path: Path, leave_out: Sequence[str] = (), **entries: Any) -> None:
    """Set entries of a JSON file, and remove the folder that the model was loaded from: same model, same bytes."""
    data = json.loads(path.read_text(encoding="utf-8")) | entries
    for name in ("_name_or_path", *leave_out):
        data.pop(name, None)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
