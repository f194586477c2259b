"""bitpolicy's own results as entries: the denoiser of an exported checkpoint, read back from disk."""

from __future__ import annotations

from pathlib import Path

import torch
from peers.entry import OWN_FILE, Entry, write_entry
from peers.own_model import denoiser_name

from bitpolicy.kernels.layers import PackedLayer
from bitpolicy.pipelines.loading import open_pipeline
from bitpolicy.policies.checkpoints.checkpoint import checkpoint_bytes


def add_checkpoint(work: Path, name: str, checkpoint: Path, share: float | None, family: str, kind: str) -> Entry:
    """Add `checkpoint`, a pipeline folder, to the comparison; its bytes are those of its file."""
    component = denoiser_name(checkpoint)
    denoiser = getattr(open_pipeline(checkpoint, torch.float32), component)
    weights = {
        f"{path}.weight": module.dequantize(torch.float32)
        for path, module in denoiser.named_modules()
        if isinstance(module, PackedLayer)
    }
    plain = {n: t for n, t in denoiser.state_dict().items() if not _packed_part(n, weights)}
    entry = Entry(name, family, kind, checkpoint_bytes(checkpoint / component), OWN_FILE, "bitpolicy", share)
    write_entry(work / "candidates", entry, {**plain, **weights})
    return entry


def _packed_part(name: str, weights: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor of the checkpoint is part of a packed weight."""
    layer, _, suffix = name.rpartition(".")
    return suffix != "bias" and f"{layer}.weight" in weights
