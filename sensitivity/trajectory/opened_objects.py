"""Objects that hold tensors, as nodes of a pytree.

A denoiser may return and take its cache of keys and values as an object. For gradients to pass through the cache, its
tensors have to be arguments and results of the call like all others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


class _Opened:
    """An object that holds tensors, such as a cache of keys and values, as a node of a pytree: its attributes.

    Unflattening gives the object itself, with the attributes that it had, so that a call may also change it.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


def opened(tree: Any) -> Any:
    """`tree` with every object that holds tensors as a node, so that its tensors are leaves."""
    return pytree.tree_map(lambda leaf: _Opened(leaf) if _holds_tensors(leaf) else leaf, tree)


def _holds_tensors(leaf: Any, around: tuple[int, ...] = ()) -> bool:
    if isinstance(leaf, torch.Tensor | nn.Module | type) or not hasattr(leaf, "__dict__") or id(leaf) in around:
        return False
    parts = pytree.tree_leaves(vars(leaf))
    return any(isinstance(part, torch.Tensor) or _holds_tensors(part, (*around, id(leaf))) for part in parts)


def _attributes_of(node: _Opened) -> tuple[list[Any], tuple[Any, tuple[str, ...]]]:
    attributes = vars(node.value)
    return [opened(value) for value in attributes.values()], (node.value, tuple(attributes))


def _object_with(values: Iterable[Any], context: tuple[Any, tuple[str, ...]]) -> Any:
    value, names = context
    vars(value).clear()
    vars(value).update(zip(names, values, strict=True))
    return value


pytree.register_pytree_node(_Opened, _attributes_of, _object_with)
