"""What putting a policy on a model takes beyond the two, measured and rounded on the reference.

A calibration has two parts. `input_means` are E[x] of each layer, for corrected biases (see
`bitpolicy.kernels.quantizers.bias_correction`). `rounded` are the packed tensors of layers that were not rounded to
nearest. It also says which weights all this is of: what quantizers made of one model is another model's weights.
A policy records its hash, so what is exported is what was searched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from bitpolicy.policies.choice import Choice
from bitpolicy.policies.finite import is_finite
from bitpolicy.policies.identity import tensors_digest

_MADE_FROM = "made from"  # of the file's tensor that has the hash of the weights; no layer's name has a space
K = TypeVar("K")
S = TypeVar("S")
T = TypeVar("T")


class RoundedKey(NamedTuple):
    """One packed tensor of a layer's weight, as a quantizer rounded it.

    Attributes:
        layer: its name.
        format: the name of the format.
        quantizer: that picked the codes.
        suffix: of the tensor among those of the format, as "weight_packed".
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
        """From the tensor's name in a file; None for a name of another kind. No layer's name has a slash."""
        parts = name.split("/")
        return cls(*parts) if len(parts) == len(cls._fields) else None

    def __str__(self) -> str:
        """The tensor's name in a file."""
        return "/".join(self)


InputMeans = Mapping[str, torch.Tensor]
"""Layer name -> E[x], float32, shape (in) or (in, *kernel)."""

RoundedWeights = Mapping[RoundedKey, torch.Tensor]
"""Packed tensors, in the dtypes and shapes of their format. Those in files are read when they are looked up."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured and rounded on one model.

    Attributes:
        input_means: E[x] by layer; a layer that was never called has none.
        rounded: the packed tensors that quantizers made.
        made_from: hash of the weights that all is made from, as a policy records it; None where nobody said, as older
            versions did not.
    """

    input_means: InputMeans = field(default_factory=dict)
    rounded: RoundedWeights = field(default_factory=dict)
    made_from: str | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Calibration:
        """From the tensors of its file, by their names there, each looked up when it is asked for.

        A name without a slash is a layer's, one with three is a `RoundedKey`; any other is passed over.
        """
        keys = {key: name for name in tensors if (key := RoundedKey.read(name)) is not None}
        layers = {name: name for name in tensors if "/" not in name and name != _MADE_FROM}
        made_from = bytes(tensors[_MADE_FROM].tolist()).decode() if _MADE_FROM in tensors else None
        return cls(_renamed(tensors, layers), _renamed(tensors, keys), made_from)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What its file holds, by the names there, each looked up when it is asked for."""
        read: dict[str, Callable[[], torch.Tensor]] = {}
        read |= {name: partial(self.input_means.__getitem__, name) for name in self.input_means}
        read |= {str(key): partial(self.rounded.__getitem__, key) for key in self.rounded}
        if self.made_from is not None:
            read[_MADE_FROM] = partial(_ascii, self.made_from)
        return _Lazy(read)

    def __bool__(self) -> bool:
        """Whether it has any entries."""
        return bool(self.input_means or self.rounded)

    @property
    def nbytes(self) -> int:
        """Tensor bytes of its file."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def needed_for(self, *policies: Mapping[str, Choice]) -> Calibration:
        """What putting any of `policies`, choices by layer, on the model takes: every E[x] that is finite, and what was
        rounded for them. All of it is read.

        No bias is corrected by an E[x] that is not finite.
        """
        chosen = (entry for policy in policies for entry in policy.items())
        wanted = {(name, choice.format.name, choice.quantizer) for name, choice in chosen}
        means = {name: mean for name, mean in self.input_means.items() if is_finite(mean)}
        rounded = {key: self.rounded[key] for key in self.rounded if key[:3] in wanted}
        return replace(self, input_means=means, rounded=rounded)

    def stamped(self, weights: str) -> Calibration:
        """The same with the hash of the weights that it was made from; one without entries stays so.

        Args:
            weights: `bitpolicy.policies.identity.weights_hash` of what is studied.
        """
        return replace(self, made_from=weights) if self else self

    def of_component(self, component: str, components: Sequence[str]) -> Calibration:
        """The entries of one component's layers, by their names within it; all of them where there is one component."""
        if len(components) == 1:
            return self
        start = f"{component}."
        means = {name.removeprefix(start): name for name in self.input_means if name.startswith(start)}
        keys = {
            key._replace(layer=key.layer.removeprefix(start)): key
            for key in self.rounded
            if key.layer.startswith(start)
        }
        return replace(self, input_means=_renamed(self.input_means, means), rounded=_renamed(self.rounded, keys))

    @property
    def sha256(self) -> str:
        """ "sha256:..." over names, dtypes, shapes and values."""
        return digest_of(self.tensors())


def digest_of(tensors: Mapping[str, torch.Tensor], dtypes: bool = True) -> str:
    """The hash of a calibration, of the tensors that its file holds.

    Args:
        dtypes: whether they count; in hashes of older policies they do not.
    """
    return f"sha256:{tensors_digest(((name, tensors[name]) for name in sorted(tensors)), dtypes)}"


def _ascii(value: str) -> torch.Tensor:
    """The characters, uint8."""
    return torch.frombuffer(bytearray(value.encode()), dtype=torch.uint8)


class _Lazy(Mapping[K, T]):
    """A mapping whose values are read each time they are looked up, and held by nobody."""

    def __init__(self, read: Mapping[K, Callable[[], T]]) -> None:
        self._read = read

    def __getitem__(self, key: K) -> T:
        return self._read[key]()

    def __contains__(self, key: object) -> bool:
        return key in self._read

    def __iter__(self) -> Iterator[K]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def _renamed(entries: Mapping[S, T], keys: Mapping[K, S]) -> Mapping[K, T]:
    """Some entries by other keys.

    Args:
        keys: new key -> key in `entries`.
    """
    return _Lazy({new: partial(entries.__getitem__, key) for new, key in keys.items()})
