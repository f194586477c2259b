"""What an exporter to another program is: what it can hold, and the files it writes.

An exporter *holds* a layer in a format if the other program, reading the file, multiplies with the very weight that
bitpolicy does, up to the rounding of that program's compute dtype. The bytes may be other than ours. A target whose
file is a recipe (`rounds_itself`) holds the formats that it has itself; it takes the scales and codes of the original
weight anew, and no bias correction and no other quantizer reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any, Protocol

import torch

from bitpolicy.kernels.formats.affine import Affine
from bitpolicy.kernels.formats.format import Format, TensorSpec
from bitpolicy.kernels.formats.packing import row_length
from bitpolicy.kernels.layers import Quantizable

Tensors = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Layer:
    """One layer as a policy has it.

    Attributes:
        name: its module path.
        kind: "Linear", "Conv1d", "Conv2d" or "Conv3d".
        shape: of its weight, (out, in/groups, *kernel).
        format: how the policy stores it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: Format

    @classmethod
    def of(cls, name: str, layer: Quantizable, format: Format) -> Layer:
        return cls(name, type(layer).__name__, tuple(layer.weight.shape), format)

    def stored_as(self, format: Format) -> Layer:
        """The same layer in another format."""
        return replace(self, format=format)

    @property
    def run(self) -> int:
        """How many weights along the wire order share a scale: a group, or the whole row."""
        group = self.format.group if isinstance(self.format, Affine) else None
        return group or row_length(self.shape)

    @property
    def even_run(self) -> int:
        """The longest run of input channels, the same at every position of a kernel, that no group's end cuts."""
        whole = self.run >= row_length(self.shape)
        return self.shape[1] if whole else gcd(self.shape[1], self.run)


@dataclass(frozen=True)
class Source:
    """What there is to export: one component under a policy.

    Attributes:
        component: its name in the pipeline, e.g. "unet".
        config: of the model, as its config.json has it, `_class_name` among it.
        storage: dtype of everything that is not packed.
        layers: every quantizable layer, by name.
        others: all tensors that no format packs, biases and FP16 weights among them, by name.
        tensors: every stored tensor in bitpolicy's own layout, those of one layer in a row.
        origin: where it comes from, as text: model, policy and its hash.
    """

    component: str
    config: Mapping[str, Any]
    storage: torch.dtype
    layers: Mapping[str, Layer]
    others: Mapping[str, TensorSpec]
    tensors: Callable[[], Tensors]
    origin: Mapping[str, str]

    @property
    def packed(self) -> dict[str, Layer]:
        return {name: layer for name, layer in self.layers.items() if layer.format.packed}

    @property
    def class_name(self) -> str:
        return str(self.config["_class_name"])


class Exporter(Protocol):
    """How one other program stores a policy."""

    @property
    def name(self) -> str:
        """What people write behind `--target`."""

    @property
    def title(self) -> str:
        """What the program calls itself."""

    @property
    def rounds_itself(self) -> bool:
        """Whether it writes a recipe, no weights."""

    @property
    def suggested(self) -> tuple[str, ...]:
        """Formats worth a search for this target, narrow ones first."""

    def holds(self, layer: Layer) -> bool:
        """Whether the target can have this layer in its format; FP16 always."""

    def write(self, source: Source, folder: Path) -> int:
        """Write the files of one component into a folder that is there; returns their tensor bytes.

        Raises:
            BitPolicyError: the target does not know this class of model.
        """


def without_rotation(format: Format) -> bool:
    """Whether an integer format keeps its weights where they are."""
    return isinstance(format, Affine) and not format.rotated
