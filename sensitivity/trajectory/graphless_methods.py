"""Lets gradients pass through methods of a model that are decorated with `torch.no_grad`.

A mixture of experts may call its experts in such a method when it is not in training, as HiDream's does. The weights of
the experts would then seem to change nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bitpolicy.sensitivity.trajectory.decoding import replaced_method


@contextmanager
def gradients_pass(model: nn.Module) -> Iterator[None]:
    """While the block runs, no method of the model's modules turns gradients off by its decorator."""
    with ExitStack() as stack:
        kinds = {type(module) for module in model.modules()}
        names = {kind: list(_graphless(kind)) for kind in kinds}
        for module in model.modules():
            for name in names[type(module)]:
                stack.enter_context(replaced_method(module, name, _undecorated))
        yield


def _undecorated(method: Any) -> Callable[..., Any]:
    original = MethodType(inspect.unwrap(method.__func__), method.__self__)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _Added():
            return original(*args, **kwargs)

    return call


class _Added(TorchFunctionMode):
    """Adds where code reduces by sum in place, which is the same, but keeps no result that the next call overwrites."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.scatter_reduce_ and kwargs == {"reduce": "sum"}:
            return torch.Tensor.scatter_add_(*args)
        return func(*args, **kwargs)


def _graphless(kind: type[nn.Module]) -> Iterator[str]:
    """The names of the methods of a class that one of torch's decorators wraps, as `torch.no_grad()` does."""
    for name in dir(kind):
        method = inspect.getattr_static(kind, name)
        if inspect.isfunction(method) and method.__globals__ is vars(torch.utils._contextlib):
            yield name
