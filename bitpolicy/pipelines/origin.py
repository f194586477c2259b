"""The pipeline that a checkpoint was made from: its policy records it, and the hash of its weights identifies it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from bitpolicy.kernels.errors import BitPolicyError, BitPolicyWarning
from bitpolicy.pipelines.loading import Source, is_ours, load_source, locate, packed_components, require_pipeline
from bitpolicy.policies.checkpoints.manifest import verify
from bitpolicy.policies.identity import config_hash, weights_hash
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.policy_records import ModelReference


def load_reference(
    checkpoint: Path,
    model: str | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    **computing: Any,
) -> Source:
    """Load the unquantized pipeline that a checkpoint is compared with.

    Args:
        checkpoint: the folder that a search or an export wrote.
        model: hub id, folder or .safetensors file; None is the one that the checkpoint's policy.yaml records. A model
            that is named here but has other weights is accepted with a warning.
        revision, variant: of the model; None is the recorded revision.
        computing: dtype and device, as for `load_source`.

    Raises:
        BitPolicyError: the folder is not a bitpolicy checkpoint, or the pipeline that it was made from is not available
            or has changed.
    """
    require_pipeline(checkpoint)
    verify(checkpoint)
    if not is_ours(checkpoint):
        raise BitPolicyError(
            f"{checkpoint} is a pipeline that bitpolicy did not pack; give the checkpoint that search-policy or "
            "`bitpolicy export` wrote (a search's is OUTPUT_DIR/checkpoint)"
        )
    policy = Policy.load(checkpoint / "policy.yaml") if (checkpoint / "policy.yaml").is_file() else None
    if policy is None:
        if model is None:
            raise BitPolicyError(
                f"{checkpoint} has no policy.yaml to say what it was made from; give that pipeline with --model"
            )
        return load_source(model, packed_components(checkpoint), revision=revision, variant=variant, **computing)
    recorded = policy.model
    if model is None:
        revision = revision or recorded.revision
        _require_there(checkpoint, recorded, revision, variant)
    source = load_source(
        model or recorded.id,
        recorded.components,
        revision=revision,
        variant=variant,
        storage=getattr(torch, policy.storage_dtype),
        lora=recorded.lora or (),
        **computing,
    )
    _compare(checkpoint, source, recorded, named=model is not None)
    return source


def _require_there(checkpoint: Path, recorded: ModelReference, revision: str | None, variant: str | None) -> None:
    try:
        locate(recorded.id, revision, variant)
    except BitPolicyError as error:
        raise BitPolicyError(
            f"{checkpoint} was made from {recorded.id}, which is not available here ({error}); give it with --model"
        ) from error


def _compare(checkpoint: Path, source: Source, recorded: ModelReference, named: bool) -> None:
    """Check that the source has the weights and the config that were packed; warn instead if the user named the model.

    Raises:
        BitPolicyError: they differ, and the user did not name the model.
    """
    for component, wanted in recorded.hashes.items():
        model, config = getattr(source.pipe, component), recorded.configs[component]
        both = [("", wanted, weights_hash(model, source.storage))]
        both += [] if config is None else [("a config with ", config, config_hash(model))]
        what, then, now = next((found for found in both if found[1] != found[2]), ("", "", ""))
        if then == now:
            continue
        text = (
            f"{checkpoint} was made from {recorded.id}, whose {component} had {what}sha256 {then[:12]}..., but "
            f"that of {source.id} has {now[:12]}..."
        )
        if not named:
            raise BitPolicyError(f"{text}: it has changed since; give the original pipeline with --model")
        warnings.warn(f"{text}: the comparison is with a different model", BitPolicyWarning, stacklevel=2)
