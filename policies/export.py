"""Export: a diffusers folder whose studied components are packed as the policy says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.atomic import write_text, written_aside
from bitpolicy.policies.calibration import Calibration, is_rounded, save_calibration
from bitpolicy.policies.checkpoint import MAX_SHARD_SIZE, write_config
from bitpolicy.policies.component import export_component
from bitpolicy.policies.denoiser import denoiser_of, of_component
from bitpolicy.policies.model_card import model_card
from bitpolicy.policies.policy import Policy


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
    """Write `pipe` as a diffusers folder with packed components, aside and renamed.

    Args:
        component: name of what is packed in the pipeline, e.g. "unet", or several, separated by commas; then the
            policy's layer names begin with theirs. They must be unquantized.
        folder: where to; a folder that is there is replaced once the new one is complete.
        component_dtype: dtype the other components are stored in; None is the policy's storage dtype.
        max_shard_size: bytes; a larger component is split as its library splits it.

    Returns:
        Tensor bytes of the packed components' files.

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
                    write_config(other, {}, component_dtype or storage, aside / name)
        nbytes = 0
        for name in components:
            own, means = of_component(choices, name, components), of_component(calibration, name, components)
            nbytes += export_component(getattr(pipe, name), own, means, storage, aside / name, max_shard_size)
        if not is_rounded(calibration) and any(choice.bias_correction for choice in choices.values()):
            save_calibration(calibration, aside / "calibration.safetensors")  # rounded, it would hold the weights again
        describe_checkpoint(aside, policy, denoiser)
    return nbytes


def describe_checkpoint(folder: Path, policy: Policy, denoiser: nn.Module) -> None:
    """Write policy.yaml and the model card of an exported folder anew, after its quality was measured."""
    policy.save(folder / "policy.yaml")
    choices = policy.resolve(name for name, _ in quantizable_layers(denoiser))
    write_text(folder / "README.md", model_card(policy, denoiser, choices))


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
