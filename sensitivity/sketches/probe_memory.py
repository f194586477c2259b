"""What a probe holds in memory to be fast, beyond the model and a step's activations.

A layer's change dW is the same at every step, so the sketch of a whole trajectory needs only the sum of the layer's
gradients,

    s(l, f) = sum over calls c of <G_{l,c}, dW> = <sum over calls c of G_{l,c}, dW>.

The sum takes four bytes a weight, and one product for each candidate. Without it, every call takes these products.
What the sums leave of the memory goes to the candidates' packed weights, which are otherwise rounded again, or read
again from their files, for every product.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from bitpolicy.kernels.layers import Quantizable

_SHARE = 0.5  # of the free memory that a probe takes by itself
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ProbeMemory:
    """How the memory of a probe is used.

    Attributes:
        summed: the layers whose gradients are summed; None for sketches step by step, which have no sums.
        packed: bytes for packed weights.
    """

    summed: frozenset[str] | None = None
    packed: int = 0

    @classmethod
    def summing(cls, layers: Mapping[str, Quantizable], nbytes: int) -> ProbeMemory:
        """Sums of as many layers as fit in `nbytes`, in their order, and packed weights in the rest."""
        summed, left = set(), nbytes
        for name, layer in layers.items():
            if (size := sum_bytes(layer)) <= left:
                summed.add(name)
                left -= size
        return cls(frozenset(summed), left)


BY_STEP = ProbeMemory()
"""Sketches by step, and no packed weights kept."""


def sum_bytes(layer: Quantizable) -> int:
    """Bytes of the sum of a layer's gradients, which is float32."""
    return 4 * layer.weight.numel()


def default_memory(device: torch.device) -> int:
    """The bytes that a probe on `device` takes unless it is told: half of what is free. Processes on one machine share
    its main memory."""
    if device.type == "cuda":
        return int(_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(_SHARE * _free_bytes()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_bytes() -> int:
    """Free bytes of main memory, within the limit of this process's control group if it has one."""
    free: int = psutil.virtual_memory().available
    try:
        limit, used = (int((_CGROUP / f"memory.{what}").read_text()) for what in ("max", "current"))
        pages = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(pages["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no control groups, or no limit
        return free
