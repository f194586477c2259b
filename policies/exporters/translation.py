"""Write a file in another program's layout, one layer in memory at a time.

All exporters that write weights share this loop: it reads bitpolicy's own tensors one by one, collects those of a
packed layer, passes them to the exporter, and writes the result to its place in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.exporters.exporter import Layer, Source
from bitpolicy.policies.finite import require_finite
from bitpolicy.policies.storage.disk_space import require_space
from bitpolicy.policies.storage.safetensors_writer import SafetensorsWriter
from bitpolicy.policies.storage.tensor_writer import TensorWriter


class Translation(Protocol):
    """How one program lays out one packed layer."""

    def specs(self, layer: Layer, storage: torch.dtype) -> dict[str, TensorSpec]:
        """Dtypes and shapes of its tensors, by the suffix of their names."""

    def convert(
        self, layer: Layer, tensors: Mapping[str, torch.Tensor], storage: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Those tensors, made from bitpolicy's own, by suffix."""


def write_translated(
    source: Source,
    path: Path,
    translation: Translation,
    writer: Callable[[Path, Mapping[str, TensorSpec]], TensorWriter] = SafetensorsWriter,
) -> int:
    """Write every tensor of `source`, with packed layers translated, and return the tensor bytes.

    Args:
        writer: makes the file, given its path and what is going to be in it.

    Raises:
        BitPolicyError: the disk is full, or the target's layout of a layer would be NaN or Inf.
    """
    packed, storage = source.packed, source.storage
    specs = dict(source.others)
    for name, layer in packed.items():
        specs |= {f"{name}.{suffix}": spec for suffix, spec in translation.specs(layer, storage).items()}
    nbytes = sum(spec.nbytes for spec in specs.values())
    require_space(path.parent, nbytes)
    with writer(path, specs) as file:
        gathered: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in source.tensors():
            owner, _, suffix = name.rpartition(".")
            if name in source.others:
                file.write(name, tensor)
                continue
            parts = gathered.setdefault(owner, {})
            parts[suffix] = tensor
            if parts.keys() == packed[owner].format.tensors(packed[owner].shape, storage).keys():
                converted = translation.convert(packed[owner], gathered.pop(owner), storage)
                made = {f"{owner}.{own}": value for own, value in converted.items()}
                require_finite(owner, made)
                for own, value in made.items():
                    file.write(own, value)
    return nbytes
