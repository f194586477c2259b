"""Export: a diffusers folder whose denoiser is packed as the policy says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.format import TensorSpec
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.accounting import ByteAccount, stored_spec
from bitpolicy.policies.apply import quantize_layer
from bitpolicy.policies.atomic import write_text, written_aside
from bitpolicy.policies.calibration import Calibration, is_rounded, save_calibration
from bitpolicy.policies.denoiser import denoiser_of, of_component
from bitpolicy.policies.diffusers_quantizer import BitPolicyConfig
from bitpolicy.policies.model_card import model_card
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.safetensors_writer import SafetensorsWriter

WEIGHTS = "diffusion_pytorch_model"
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
) -> int:
    """Write `pipe` as a diffusers folder with a packed denoiser, aside and renamed.

    Args:
        component: name of the denoiser in the pipeline, e.g. "unet", or several, separated by commas; then the policy's
            layer names begin with theirs. They must be unquantized.
        folder: where to; a folder that is there is replaced once the new one is complete.
        component_dtype: dtype the other components are stored in; None is the policy's storage dtype.
        max_shard_size: bytes; a larger denoiser is split as diffusers splits it.

    Returns:
        Tensor bytes of the denoiser's file or files.

    Raises:
        BitPolicyError: the policy does not fit the model, the calibration is missing, or the disk is full.
    """
    denoiser, components = denoiser_of(pipe, component), component.split(",")
    storage = getattr(torch, policy.storage_dtype)
    choices = policy.resolve(name for name, _ in quantizable_layers(denoiser))
    _require_space(folder, ByteAccount.of(denoiser, storage).total({n: c.format for n, c in choices.items()}))
    if folder.exists() and not (folder / "model_index.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise BitPolicyError(f"{folder} holds something that is no pipeline; export to a new or an empty folder")
    with written_aside(folder) as aside:
        aside.mkdir()
        pipe.save_config(aside)
        for name, other in pipe.components.items():
            if name not in components and hasattr(other, "save_pretrained"):
                _forget_last_call(other)
                with _stored_as(other, component_dtype or storage):
                    other.save_pretrained(aside / name)
                if isinstance(other, ModelMixin):  # so that it, too, keeps its dtype when it is loaded without one
                    _write_config(other, {}, component_dtype or storage, aside / name)
        nbytes = 0
        for name in components:
            own, means = of_component(choices, name, components), of_component(calibration, name, components)
            nbytes += export_denoiser(getattr(pipe, name), own, means, storage, aside / name, max_shard_size)
        if not is_rounded(calibration) and any(choice.bias_correction for choice in choices.values()):
            save_calibration(calibration, aside / "calibration.safetensors")  # rounded, it would hold the weights again
        describe_checkpoint(aside, policy, denoiser)
    return nbytes


def describe_checkpoint(folder: Path, policy: Policy, denoiser: nn.Module) -> None:
    """Write policy.yaml and the model card of an exported folder anew, after its quality was measured."""
    policy.save(folder / "policy.yaml")
    choices = policy.resolve(name for name, _ in quantizable_layers(denoiser))
    write_text(folder / "README.md", model_card(policy, denoiser, choices))


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
    _write_config(denoiser, choices, storage, folder)
    specs = packed_specs(denoiser, choices, storage)
    shards = _shards(specs, max_shard_size)
    with ExitStack() as files:
        place: dict[str, SafetensorsWriter] = {}
        for file, names in shards.items():
            writer = files.enter_context(SafetensorsWriter(folder / file, {name: specs[name] for name in names}))
            place |= dict.fromkeys(names, writer)
        for name, tensor in packed_tensors(denoiser, choices, calibration, storage):
            place[name].write(name, tensor)
    total = sum(spec.nbytes for spec in specs.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {n: f for f, names in shards.items() for n in names}}
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


def _packed_name(name: str, choices: Mapping[str, Choice]) -> str | None:
    """The layer whose packed tensors stand for state-dict entry `name`, or None."""
    layer, _, leaf = name.rpartition(".")
    return layer if leaf == "weight" and layer in choices and choices[layer].format.packed else None


def packed_specs(denoiser: nn.Module, choices: Mapping[str, Choice], storage: torch.dtype) -> dict[str, TensorSpec]:
    """Every stored tensor, by name, before anything is quantized."""
    specs: dict[str, TensorSpec] = {}
    for name, tensor in denoiser.state_dict().items():
        layer = _packed_name(name, choices)
        if layer is None:
            specs[name] = stored_spec(tensor, storage)
        else:
            stored = choices[layer].format.tensors(tensor.shape, storage)
            specs |= {f"{layer}.{suffix}": spec for suffix, spec in stored.items()}
    return specs


def packed_tensors(
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
    if len(groups) == 1:
        return {f"{WEIGHTS}.safetensors": groups[0]}
    return {f"{WEIGHTS}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_config(denoiser: Any, choices: Mapping[str, Choice], storage: torch.dtype, folder: Path) -> None:
    denoiser.save_config(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = BitPolicyConfig.of(choices, storage).to_dict()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _forget_last_call(component: Any) -> None:
    """Take off a fast tokenizer the padding and truncation of its last call, which would be saved with it."""
    backend = getattr(component, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()


@contextmanager
def _stored_as(component: Any, dtype: torch.dtype) -> Iterator[None]:
    """Hold a component in the dtype it is stored in while the block runs."""
    if not isinstance(component, nn.Module):
        yield
        return
    parameters = [(parameter, parameter.data) for parameter in component.parameters()]
    buffers = [(module, name, buffer) for module in component.modules() for name, buffer in module._buffers.items()]
    nn.Module.to(component, dtype)  # diffusers' own warns of modules kept in float32, even of none
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def _require_space(folder: Path, nbytes: int) -> None:
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise BitPolicyError(
            f"{parent} has {free:,} bytes free, the checkpoint needs at least {nbytes:,}; "
            "free some space or choose another --output-dir"
        )
