"""Mappings that look a value up when it is needed, and what they show: some entries under other names.

Where several components are under study, the name of a layer begins with its component's. Within one component it does
not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

K = TypeVar("K")
S = TypeVar("S")
T = TypeVar("T")


class Lazy(Mapping[K, T]):
    """A mapping that reads a value on each lookup and does not keep it."""

    def __init__(self, read: Mapping[K, Callable[[], T]]) -> None:
        self._read = read

    @classmethod
    def renamed(cls, entries: Mapping[S, T], keys: Mapping[K, S]) -> Lazy[K, T]:
        """A view of some entries under other keys.

        Args:
            keys: new key -> key in `entries`.
        """
        return cls({new: partial(entries.__getitem__, key) for new, key in keys.items()})

    def __getitem__(self, key: K) -> T:
        return self._read[key]()

    def __contains__(self, key: object) -> bool:
        return key in self._read

    def __iter__(self) -> Iterator[K]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def layer_prefix(component: str, components: Sequence[str]) -> str:
    """What the names of a component's layers begin with where `components` are under study."""
    return "" if len(components) == 1 else f"{component}."


def within_component(by_layer: Mapping[str, T], prefix: str) -> Mapping[str, T]:
    """The entries whose names begin with `prefix`, by the rest of the name, looked up lazily."""
    if not prefix:
        return by_layer
    return Lazy.renamed(by_layer, {name.removeprefix(prefix): name for name in by_layer if name.startswith(prefix)})
