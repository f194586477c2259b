"""A pipeline that draws with the components of a checkpoint, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpolicy.kernels.compute.setting import set_compute
from bitpolicy.kernels.dispatch import ROUNDED
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.kernel import Compute
from bitpolicy.pipelines.loading import Source, open_pipeline
from bitpolicy.policies.identity import configured
from bitpolicy.policies.target import Target


@contextmanager
def swapped_components(source: Source, checkpoint: Path, compute: Compute | None = None) -> Iterator[Compute]:
    """Inside the block, the source pipeline draws with the checkpoint's components, which are read from disk and
    compared with its manifest. The pipeline keeps its own component if both are equal.

    Args:
        compute: compute mode of the packed layers; None is the mode that the checkpoint records. The block receives the
            mode in use.

    Raises:
        BitPolicyError: a file of the checkpoint is not as it was written, or no layer can use that compute mode.
    """
    dtype = source.target.dtype
    reloaded = open_pipeline(checkpoint, dtype, everything=True)
    if compute is not None and not set_compute(reloaded, compute) and compute is not Compute.EXACT:
        multiplied = " and ".join(format.name for format in ROUNDED.get(compute, ()))
        wanted = f"in {multiplied}" if multiplied else "with at least 32 weights per row"
        raise BitPolicyError(
            f"no layer of {checkpoint} can use compute {compute}, which is for layers {wanted}; give another compute"
        )
    packed = Target.of(reloaded, source.components).packed_layers.values()
    used = next((layer.compute for layer in packed), Compute.EXACT)
    device, originals = source.pipe._execution_device, {}
    try:
        for name, own in reloaded.components.items():
            original = getattr(source.pipe, name)
            if not _equal(own, original):
                originals[name] = original
                setattr(source.pipe, name, own.to(device) if isinstance(own, nn.Module) else own)
        del reloaded, own
        yield used
    finally:
        for name, original in originals.items():
            setattr(source.pipe, name, original)


def _equal(one: Any, other: Any) -> bool:
    """Whether two components of pipelines have the same config and weights."""
    if configured(one) != configured(other):
        return False
    if not isinstance(one, nn.Module):
        return True
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(t.to(theirs[n].device), theirs[n]) for n, t in ours.items())
