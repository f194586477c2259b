"""Export one component of a pipeline: a diffusers denoiser or autoencoder, or a transformers text encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.checkpoints.checkpoint import (
    MAX_SHARD_SIZE,
    checkpoint_bytes,
    export_diffusers_model,
    write_packed,
)
from bitpolicy.policies.loading.packed_config import BitPolicyConfig
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.pipeline_files import TRANSFORMERS
from bitpolicy.policies.storage.source import ModuleSource, TensorSource


def export_component(
    model: nn.Module,
    choices: Mapping[str, Choice],
    folder: Path,
    max_shard_size: int = MAX_SHARD_SIZE,
    source: TensorSource | None = None,
    *,
    quantization: Quantization,
) -> int:
    """Write the config and the packed weights of one unquantized model, as its own library reads them.

    Args:
        model: a diffusers or transformers model; it may be on `meta` if `source` is given.
        choices: by the layers' names in the model; a layer without a choice stays as it is.
        folder: output folder; created if needed.
        max_shard_size: bytes; a larger model is split as its library splits it.
        source: its tensors; None means those of `model`.
        quantization: its calibration uses the same layer names, for the choices that need it. Its storage dtype applies
            to everything that is not packed, its compute to the packed layers after loading.

    Returns:
        Tensor bytes of the files.

    Raises:
        BitPolicyError: the model belongs to neither library, a layer to pack shares its weight with another layer, or
            a calibration is missing.
    """
    if isinstance(model, ModelMixin):
        return export_diffusers_model(model, choices, folder, max_shard_size, source, quantization=quantization)
    if not isinstance(model, PreTrainedModel):
        raise BitPolicyError(f"{type(model).__name__} is not a model of diffusers or transformers; give one of theirs")
    tied = model.all_tied_weights_keys
    for name in {*tied, *tied.values()}:
        choice = choices.get(name.removesuffix(".weight"))
        if choice is not None and choice.format.packed:
            raise BitPolicyError(f"{name} is shared with another layer and cannot be packed; give it fp16")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = source or ModuleSource(model)
    checksums = write_packed(
        model, tensors, choices, folder, TRANSFORMERS, max_shard_size, frozenset(tied), quantization=quantization
    )
    config = copy.deepcopy(model.config)
    config.dtype = str(quantization.storage).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.quantization_config = BitPolicyConfig.of(choices, quantization.storage, checksums, quantization.compute)
    config.save_pretrained(folder)
    return checkpoint_bytes(folder)
