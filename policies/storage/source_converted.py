"""The tensors of a checkpoint in another layout, converted one at a time.

Converters in diffusers take the whole state dict of an original checkpoint and return another. Most rename tensors;
some split fused weights, swap halves or join tensors. Here a converter runs once on `meta` tensors, which have shapes
but no values, while every operation is recorded. A converted tensor is computed on access, by replaying the recorded
operations on the values that it depends on, so nothing else is read. A converter that looks at values cannot be
recorded. It runs on all tensors, mapped from their file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.storage.source import TensorSource

StateDict = dict[str, Any]
Converter = Callable[[StateDict], Mapping[str, Any]]


def converted(base: TensorSource, convert: Converter) -> TensorSource:
    """The tensors of `base`, converted by `convert`.

    Args:
        convert: takes a state dict, which it may change, and returns another; it does not write to tensors.
    """
    try:
        return _Replayed(base, convert)
    except (RuntimeError, TypeError):  # `meta` tensors have no values to look at
        return _Converted({name: base.read(name) for name in base.specs}, convert)


@dataclass(frozen=True)
class _Step:
    """One operation of a conversion."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Recorder(TorchDispatchMode):
    """While active, records the operation that makes each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[_Step, int]] = {}
        self._alive: list[Any] = []  # keeps ids unique

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} writes to a tensor")
        out = func(*args, **(kwargs or {}))
        self._alive.append(out)
        for i, tensor in enumerate(tree_leaves(out)):
            self.made[id(tensor)] = _Step(func, args, kwargs or {}), i
        return out


class _Replayed:
    def __init__(self, base: TensorSource, convert: Converter) -> None:
        self._base = base
        blank = {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in base.specs.items()}
        self._names = {id(tensor): name for name, tensor in blank.items()}
        with torch.no_grad(), _Recorder() as recorder:
            found = convert(dict(blank))
        self._keep, self._recorder = blank, recorder
        self._tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._value(self._tensors[name])

    def _value(self, recorded: Any) -> Any:
        if isinstance(recorded, torch.device) and recorded.type == "meta":
            return torch.device("cpu")
        if not isinstance(recorded, torch.Tensor):
            return recorded
        if id(recorded) in self._names:
            return self._base.read(self._names[id(recorded)])
        step, i = self._recorder.made[id(recorded)]
        return tree_leaves(step.function(*tree_map(self._value, step.args), **tree_map(self._value, step.kwargs)))[i]


class _Converted:
    def __init__(self, tensors: StateDict, convert: Converter) -> None:
        self._tensors = {n: t for n, t in convert(tensors).items() if isinstance(t, torch.Tensor)}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]
