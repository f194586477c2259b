"""Export a pipeline as a diffusers folder, with the target packed as the policy says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.kernel import Compute
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.apply import choices_for
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.checkpoint import MAX_SHARD_SIZE
from bitpolicy.policies.checkpoints.component import export_component
from bitpolicy.policies.checkpoints.manifest import write_manifest
from bitpolicy.policies.checkpoints.model_card import PLAIN, Card, model_card
from bitpolicy.policies.checkpoints.parts import MemoryParts, Parts
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.atomic import folder_written_aside, write_text
from bitpolicy.policies.storage.calibration_file import save_calibration
from bitpolicy.policies.storage.disk_space import require_space
from bitpolicy.policies.target import Target


def export_pipeline(
    pipe: DiffusionPipeline,
    components: Sequence[str],
    policy: Policy,
    calibration: Calibration,
    folder: Path,
    *,
    component_dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    card: Card = PLAIN,
) -> int:
    """Write a pipeline in memory as a diffusers folder with packed components; see `export_parts`.

    Args:
        components: names of the components to pack, e.g. ["unet"]. They must be unquantized.
    """
    parts = MemoryParts(pipe, components)
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
    """Write a diffusers folder with packed components, atomically, with one layer in memory at a time.

    Args:
        folder: output folder; an existing one is replaced once the new one is complete.
        component_dtype: dtype that the other components are stored in; None means the policy's storage dtype.
        max_shard_size: bytes; a larger component is split as its library splits it.
        card: what the model card says in addition to the policy.

    Returns:
        Tensor bytes of the packed components' files.

    Raises:
        BitPolicyError: the policy does not fit the model, the calibration is missing, or the disk is full.
    """
    storage = getattr(torch, policy.storage_dtype)
    others = component_dtype or storage
    quantization = Quantization(calibration=calibration, storage=storage, compute=Compute(policy.compute))
    choices = choices_for(parts.target, policy)
    if folder.exists() and not (folder / "model_index.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise BitPolicyError(f"{folder} holds something that is not a pipeline; export to a new or empty folder")
    with folder_written_aside(folder) as aside:
        packed = ByteAccount.of(parts.target, storage).total({name: c.format for name, c in choices.items()})
        calibration_bytes = calibration.nbytes if _is_kept(calibration, choices) else 0
        require_space(aside.parent, packed + calibration_bytes + parts.to_write(others, aside))
        aside.mkdir()
        parts.write_others(others, aside)
        nbytes = 0
        for name, model in parts.target.items():
            nbytes += export_component(
                model,
                parts.target.of_component(choices, name),
                aside / name,
                max_shard_size=max_shard_size,
                source=parts.sources[name],
                quantization=quantization.of_component(name, parts.target.names),
            )
        if _is_kept(calibration, choices):
            save_calibration(calibration, aside / "calibration.safetensors")
        describe_checkpoint(aside, policy, parts.target, card)
        write_manifest(aside)
    return nbytes


def describe_checkpoint(folder: Path, policy: Policy, target: Target, card: Card = PLAIN) -> None:
    """Write policy.yaml and the model card of an exported folder, or update them after its quality was measured."""
    write_text(folder / "policy.yaml", policy.to_yaml())  # `export_parts` decides whether to save its calibration
    choices = choices_for(target, policy)
    write_text(folder / "README.md", model_card(policy, target, choices, card))


def _is_kept(calibration: Calibration, choices: Mapping[str, Choice]) -> bool:
    """Whether to save the calibration. One with rounded layers would store their weights a second time."""
    return not calibration.rounded and any(choice.bias_correction for choice in choices.values())
