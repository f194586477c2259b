"""A calibration: what a search measured on the reference model, for an export to use with the policy and the model.

It has two parts. `input_means` holds E[x] of each layer, for bias correction (see
`bitpolicy.kernels.quantizers.bias_correction`). `rounded` holds the packed tensors of layers that were not rounded to
nearest. A calibration also records the hash of the weights it was made from, because it is wrong for any other model.
The policy records the hash of the calibration, so an export uses exactly what was searched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch

from bitpolicy.policies.choice import Choice
from bitpolicy.policies.finite import is_finite
from bitpolicy.policies.identity import tensors_digest
from bitpolicy.policies.lazy import Lazy, layer_prefix, within_component

_MADE_FROM = "made from"  # name of the tensor that holds the hash of the weights; no layer's name has a space


class RoundedKey(NamedTuple):
    """Identifies one packed tensor of a rounded weight.

    Attributes:
        layer: name of the layer.
        format: name of the format.
        quantizer: name of the quantizer that picked the codes.
        suffix: which of the format's tensors, e.g. "weight_packed".
    """

    layer: str
    format: str
    quantizer: str
    suffix: str

    @classmethod
    def of(cls, layer: str, choice: Choice, suffix: str) -> RoundedKey:
        return cls(layer, choice.format.name, choice.quantizer, suffix)

    @classmethod
    def read(cls, name: str) -> RoundedKey | None:
        """Parse the name of a tensor in a file; None if it is not a key. No layer's name has a slash."""
        parts = name.split("/")
        return cls(*parts) if len(parts) == len(cls._fields) else None

    def __str__(self) -> str:
        """The tensor's name in a file."""
        return "/".join(self)


InputMeans = Mapping[str, torch.Tensor]
"""Layer name -> E[x], float32, shape (in) or (in, *kernel)."""

RoundedWeights = Mapping[RoundedKey, torch.Tensor]
"""Packed tensors in the dtypes and shapes of their format. Tensors in files are read on each lookup."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Measurements and rounded weights of one model.

    Attributes:
        input_means: E[x] by layer; a layer that was never called has none.
        rounded: packed tensors made by quantizers.
        made_from: hash of the model's weights, as a policy records it; None if unknown, as in files of older versions.
    """

    input_means: InputMeans = field(default_factory=dict)
    rounded: RoundedWeights = field(default_factory=dict)
    made_from: str | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Calibration:
        """A calibration of the tensors in a file, by their names there; they are looked up lazily.

        A name without a slash is a layer's name; a name with three slashes is a `RoundedKey`. Others are ignored.
        """
        keys = {key: name for name in tensors if (key := RoundedKey.read(name)) is not None}
        layers = {name: name for name in tensors if "/" not in name and name != _MADE_FROM}
        made_from = bytes(tensors[_MADE_FROM].tolist()).decode() if _MADE_FROM in tensors else None
        return cls(Lazy.renamed(tensors, layers), Lazy.renamed(tensors, keys), made_from)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """All tensors under the names that they have in the file, looked up lazily."""
        read: dict[str, Callable[[], torch.Tensor]] = {}
        read |= {name: partial(self.input_means.__getitem__, name) for name in self.input_means}
        read |= {str(key): partial(self.rounded.__getitem__, key) for key in self.rounded}
        if self.made_from is not None:
            read[_MADE_FROM] = partial(_ascii, self.made_from)
        return Lazy(read)

    def __bool__(self) -> bool:
        """Whether it has any entries."""
        return bool(self.input_means or self.rounded)

    @property
    def nbytes(self) -> int:
        """Tensor bytes of the file."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def needed_for(self, *policies: Mapping[str, Choice]) -> Calibration:
        """The part that an export under any of `policies` needs, read into memory: the weights rounded for them, and
        every finite E[x]. A bias is never corrected with an E[x] that is not finite.

        Args:
            policies: each maps layer names to choices.
        """
        chosen = (entry for policy in policies for entry in policy.items())
        wanted = {(name, choice.format.name, choice.quantizer) for name, choice in chosen}
        means = {name: mean for name, mean in self.input_means.items() if is_finite(mean)}
        rounded = {key: self.rounded[key] for key in self.rounded if key[:3] in wanted}
        return replace(self, input_means=means, rounded=rounded)

    def stamped(self, weights: str) -> Calibration:
        """A copy that records the hash of the weights it was made from; an empty calibration is returned unchanged.

        Args:
            weights: hash by `bitpolicy.policies.identity.weights_hash`.
        """
        return replace(self, made_from=weights) if self else self

    def of_component(self, component: str, components: Sequence[str]) -> Calibration:
        """The entries of one component, under the layers' names within it.

        Args:
            components: all that the calibration covers. If there is only one, layer names have no prefix.
        """
        start = layer_prefix(component, components)
        if not start:
            return self
        keys = {
            key._replace(layer=key.layer.removeprefix(start)): key
            for key in self.rounded
            if key.layer.startswith(start)
        }
        means = within_component(self.input_means, start)
        return replace(self, input_means=means, rounded=Lazy.renamed(self.rounded, keys))

    @property
    def sha256(self) -> str:
        """ "sha256:..." over names, dtypes, shapes and values."""
        return digest_of(self.tensors())


def digest_of(tensors: Mapping[str, torch.Tensor], dtypes: bool = True) -> str:
    """The hash of a calibration, given the tensors of its file.

    Args:
        dtypes: whether dtypes are hashed; older policies recorded a hash without them.
    """
    return f"sha256:{tensors_digest(((name, tensors[name]) for name in sorted(tensors)), dtypes)}"


def _ascii(value: str) -> torch.Tensor:
    """The characters, uint8."""
    return torch.frombuffer(bytearray(value.encode()), dtype=torch.uint8)
