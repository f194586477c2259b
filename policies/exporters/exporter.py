"""The interface of an exporter to another program: which layers it can hold, and the files that it writes.

An exporter *holds* a layer in a format if the other program, reading the file, multiplies with exactly the weight that
bitpolicy uses, up to the rounding of that program's compute dtype. The bytes may differ from ours. A target whose file
is a recipe (`rounds_itself`) holds the formats that it has itself. It computes scales and codes from the original
weight, so bias correction and other quantizers have no effect there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import ModelMixin

from bitpolicy.kernels.formats.affine import Affine
from bitpolicy.kernels.formats.format import Format, TensorSpec
from bitpolicy.kernels.formats.packing import row_length
from bitpolicy.kernels.layers import Quantizable

Tensors = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Layer:
    """One layer under a policy.

    Attributes:
        name: its module path.
        kind: "Linear", "Conv1d", "Conv2d" or "Conv3d".
        shape: of its weight, (out, in/groups, *kernel).
        format: how the policy stores it.
        merged: whether the other program stores it as one with other layers.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: Format
    merged: bool = False

    @classmethod
    def of(cls, name: str, layer: Quantizable, format: Format, merged: bool = False) -> Layer:
        return cls(name, type(layer).__name__, tuple(layer.weight.shape), format, merged)

    def stored_as(self, format: Format) -> Layer:
        """The same layer in another format."""
        return replace(self, format=format)

    @property
    def run(self) -> int:
        """The number of weights, in stored order, that share a scale: a group, or the whole row."""
        group = self.format.group if isinstance(self.format, Affine) else None
        return group or row_length(self.shape)

    @property
    def even_run(self) -> int:
        """The longest run of input channels, the same at every position of a kernel, that no group boundary cuts."""
        whole = self.run >= row_length(self.shape)
        return self.shape[1] if whole else gcd(self.shape[1], self.run)


@dataclass(frozen=True)
class Source:
    """What is exported: one component under a policy.

    Attributes:
        component: its name in the pipeline, e.g. "unet".
        config: of the model, as in its config.json, including `_class_name`.
        storage: dtype of everything that is not packed.
        layers: every quantizable layer, by name.
        others: all tensors that are not packed, including biases and FP16 weights, by name.
        tensors: every stored tensor in bitpolicy's own layout, one layer after another.
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
        """The value of `--target`."""

    @property
    def title(self) -> str:
        """The program's own name."""

    @property
    def rounds_itself(self) -> bool:
        """Whether it writes a recipe instead of weights."""

    @property
    def suggested(self) -> tuple[str, ...]:
        """Formats worth searching with for this target, narrow ones first."""

    def holds(self, layer: Layer) -> bool:
        """Whether the target can hold this layer in its format; always true for FP16."""

    def tied(self, config: Mapping[str, Any], layers: Iterable[str]) -> list[list[str]]:
        """Groups of layers that the target stores as one, so that they must have one format.

        Args:
            config: of the model, as in `Source`.
            layers: names of its quantizable layers.

        Raises:
            BitPolicyError: the target does not know this class of model.
        """

    def write(self, source: Source, folder: Path) -> int:
        """Write the files of one component into an existing folder, and return their tensor bytes.

        Args:
            source: tied layers have one format.

        Raises:
            BitPolicyError: the target does not know this class of model.
        """


def config_of(model: Any) -> dict[str, Any]:
    """A model's config as in its config.json, including `_class_name`, but not the folder that it was loaded from."""
    entries = json.loads(model.to_json_string()) if isinstance(model, ModelMixin) else {}
    entries.pop("_name_or_path", None)
    return {**entries, "_class_name": type(model).__name__}


def without_rotation(format: Format) -> bool:
    """Whether it is an integer format that does not rotate weights."""
    return isinstance(format, Affine) and not format.rotated
