"""Finds the arguments of a pipeline call that have no effect: the images are the same without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bitpolicy.policies.components import runs_in_loop
from bitpolicy.sensitivity.calls.caller import Caller
from bitpolicy.sensitivity.calls.form import Form
from bitpolicy.sensitivity.calls.outputs import drawn
from bitpolicy.sensitivity.calls.rehearsal import REFUSALS
from bitpolicy.sensitivity.samples import Sample

_Shapes = list[tuple[int, ...]]


class _OtherShapes(BaseException):
    """Leaves a run whose first call of a denoiser gets inputs of other shapes."""


def without_effect(caller: Caller, form: Form, sample: Sample, names: Sequence[str]) -> list[str]:
    """The arguments in `names` without which `sample` comes out the same.

    This takes a run of two steps, and one more for each argument. Arguments that make no difference there are tried
    again in runs of full length. A run in which the denoiser gets inputs of other shapes, which may be far larger, is
    left at once: the argument has an effect. The result never includes an argument that equals its default, one that is
    required, or a size that the images have anyway, such as a height of 512 where 512 is usual.
    """
    defaults = caller.signature.defaults
    wanted = [name for name in names if name in caller.call and _differs(caller.call[name], defaults, name)]
    for whole in (False, True):
        if wanted:
            shapes: _Shapes = []
            plain = _image(caller, form, sample, whole, shapes)
            wanted = [name for name in wanted if not _is_size(caller.call[name], plain)]
            wanted = [
                name for name in wanted if _same(plain, _image(_without(caller, name), form, sample, whole, shapes))
            ]
    return wanted


def _differs(value: Any, defaults: Any, name: str) -> bool:
    return name in defaults and not (type(value) is type(defaults[name]) and value == defaults[name])


def _is_size(value: Any, image: torch.Tensor | None) -> bool:
    return isinstance(value, int) and image is not None and value in image.shape[-2:] + image.shape[:-3]


def _without(caller: Caller, name: str) -> Caller:
    return Caller(caller.pipe, {key: value for key, value in caller.call.items() if key != name})


def _image(caller: Caller, form: Form, sample: Sample, whole: bool, shapes: _Shapes) -> torch.Tensor | None:
    """The result of a trial run; None if the pipeline refuses the call, or if the denoiser gets other `shapes`."""
    try:
        with _first_call(caller, shapes):
            return drawn(caller.trial([sample], form.writing, form.finished, whole=whole), 1)[0]
    except _OtherShapes:
        return None
    except REFUSALS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None


@contextmanager
def _first_call(caller: Caller, shapes: _Shapes) -> Iterator[None]:
    """While the block runs, compare the shapes of the first call in the loop with `shapes`; fill these if empty."""
    called: list[nn.Module] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        if called:
            return
        called.append(module)
        found = [tuple(leaf.shape) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if shapes and found != shapes:
            raise _OtherShapes
        shapes[:] = found

    models = [model for model in caller.pipe.components.values() if runs_in_loop(model)]
    handles = [model.register_forward_pre_hook(look, with_kwargs=True) for model in models]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)
