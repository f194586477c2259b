"""Export: a diffusers folder whose denoiser is packed as the policy says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.format import TensorSpec
from bitpolicy.kernels.layers import Quantizable, quantizable_layers
from bitpolicy.policies.accounting import ByteAccount, stored_spec
from bitpolicy.policies.apply import as_stored, quantize_tensors
from bitpolicy.policies.atomic import write_text, written_aside
from bitpolicy.policies.calibration import Calibration, is_rounded, save_calibration
from bitpolicy.policies.denoiser import denoisers_in, of_component
from bitpolicy.policies.model_card import PLAIN, Card, model_card
from bitpolicy.policies.parts import MemoryParts, Parts, layers_of, write_config
from bitpolicy.policies.pipeline_files import DIFFUSERS as WEIGHTS
from bitpolicy.policies.pipeline_files import shard_names, weights_index
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.safetensors_writer import SafetensorsWriter
from bitpolicy.policies.source import ModuleSource, TensorSource, header

MAX_SHARD_SIZE = 10 * 10**9  # bytes; diffusers' default


def export_pipeline(
    pipe: DiffusionPipeline,
    component: str,
    policy: Policy,
    calibration: Calibration,
    folder: Path,
    *,
    component_dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    card: Card = PLAIN,
) -> int:
    """Write a pipeline in memory as a diffusers folder with a packed denoiser; see `export_parts`.

    Args:
        component: name of the denoiser in the pipeline, e.g. "unet", or several, separated by commas; then the policy's
            layer names begin with theirs. They must be unquantized.
    """
    parts = MemoryParts(pipe, component)
    return export_parts(
        parts, policy, calibration, folder, component_dtype=component_dtype, max_shard_size=max_shard_size, card=card
    )


def export_parts(
    parts: Parts,
    policy: Policy,
    calibration: Calibration,
    folder: Path,
    *,
    component_dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    card: Card = PLAIN,
) -> int:
    """Write a diffusers folder with a packed denoiser, aside and renamed, one layer in memory at a time.

    Args:
        folder: where to; a folder that is there is replaced once the new one is complete.
        component_dtype: dtype the other components are stored in; None is the policy's storage dtype.
        max_shard_size: bytes; a larger denoiser is split as diffusers splits it.
        card: what the model card says beyond the policy.

    Returns:
        Tensor bytes of the denoiser's file or files.

    Raises:
        BitPolicyError: the policy does not fit the model, the calibration is missing, or the disk is full.
    """
    storage = getattr(torch, policy.storage_dtype)
    others = component_dtype or storage
    choices = policy.resolve(layers_of(parts))
    if folder.exists() and not (folder / "model_index.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise BitPolicyError(f"{folder} holds something that is no pipeline; export to a new or an empty folder")
    with written_aside(folder) as aside:
        packed = ByteAccount.of(parts.denoiser, storage).total({name: c.format for name, c in choices.items()})
        _require_space(aside.parent, packed + parts.to_write(others, aside))
        aside.mkdir()
        parts.write_others(others, aside)
        nbytes = 0
        components = list(parts.sources)
        for name, denoiser in zip(components, denoisers_in(parts.denoiser), strict=True):
            own, means = of_component(choices, name, components), of_component(calibration, name, components)
            source = parts.sources[name]
            nbytes += export_denoiser(denoiser, own, means, storage, aside / name, max_shard_size, source)
        if not is_rounded(calibration) and any(choice.bias_correction for choice in choices.values()):
            save_calibration(calibration, aside / "calibration.safetensors")  # rounded, it would hold the weights again
        describe_checkpoint(aside, policy, parts.denoiser, card)
    return nbytes


def describe_checkpoint(folder: Path, policy: Policy, denoiser: nn.Module, card: Card = PLAIN) -> None:
    """Write policy.yaml and the model card of an exported folder anew, after its quality was measured."""
    policy.save(folder / "policy.yaml")
    choices = policy.resolve(name for name, _ in quantizable_layers(denoiser))
    write_text(folder / "README.md", model_card(policy, denoiser, choices, card))


def checkpoint_bytes(folder: Path) -> int:
    """Tensor bytes of the safetensors files in a denoiser's folder, as their headers tell."""
    return sum(spec.nbytes for path in sorted(folder.glob("*.safetensors")) for spec in header(path).values())


def export_denoiser(
    denoiser: nn.Module,
    choices: Mapping[str, Choice],
    calibration: Calibration,
    storage: torch.dtype,
    folder: Path,
    max_shard_size: int = MAX_SHARD_SIZE,
    source: TensorSource | None = None,
) -> int:
    """Write the config and the packed weights of one denoiser.

    A layer is read and quantized while the one before it is written; no third is in memory.

    Args:
        source: of its tensors; None is the denoiser itself, which else may lie on `meta`.

    Returns:
        Its tensor bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(denoiser, choices, storage, folder)
    specs = _specs(denoiser, choices, storage)
    shards = _shards(specs, max_shard_size)
    with ExitStack() as files:
        place: dict[str, SafetensorsWriter] = {}
        for file, names in shards.items():
            writer = files.enter_context(SafetensorsWriter(folder / file, {name: specs[name] for name in names}))
            place |= dict.fromkeys(names, writer)
        _write_behind(place, _tensors(denoiser, source or ModuleSource(denoiser), choices, calibration, storage))
    if len(shards) > 1:
        index = weights_index({file: {name: specs[name] for name in names} for file, names in shards.items()})
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(index, encoding="utf-8")
    return sum(spec.nbytes for spec in specs.values())


def _write_behind(place: Mapping[str, SafetensorsWriter], layers: Iterator[dict[str, torch.Tensor]]) -> None:
    """Write the tensors of each layer while the next ones are made."""

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
    denoiser: nn.Module,
    source: TensorSource,
    choices: Mapping[str, Choice],
    calibration: Calibration,
    storage: torch.dtype,
) -> Iterator[dict[str, torch.Tensor]]:
    """Every stored tensor, those of one layer at a time."""
    done = set()
    for name, layer in quantizable_layers(denoiser):
        if name in choices and choices[name].format.packed:
            stored = _quantized(name, layer, source, choices[name], calibration, storage)
            done |= {f"{name}.weight", *stored}
            yield stored
    for name in denoiser.state_dict():
        if name not in done:
            yield {name: as_stored(name, source.read(name), storage)}


def _quantized(
    name: str,
    layer: Quantizable,
    source: TensorSource,
    choice: Choice,
    calibration: Calibration,
    storage: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The stored tensors of one layer, by their names in the file."""
    weight = as_stored(f"{name}.weight", source.read(f"{name}.weight"), storage)
    bias = None if layer.bias is None else source.read(f"{name}.bias")
    stored = quantize_tensors(name, layer, weight, bias, choice, calibration)
    tensors = {f"{name}.{suffix}": tensor for suffix, tensor in stored.tensors.items()}
    return tensors if stored.bias is None else {**tensors, f"{name}.bias": stored.bias}


def _shards(specs: Mapping[str, TensorSpec], most: int) -> dict[str, list[str]]:
    """File name -> tensor names, filled in name order, none over `most` bytes unless one tensor is."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in sorted(specs.items()):
        if groups[-1] and size + spec.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.nbytes
    return dict(zip(shard_names(WEIGHTS, len(groups)), groups, strict=True))


def _require_space(parent: Path, nbytes: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise BitPolicyError(
            f"{parent} has {free:,} bytes free, the checkpoint needs at least {nbytes:,}; "
            "free some space or choose another --output-dir"
        )
