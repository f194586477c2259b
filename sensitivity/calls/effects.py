"""Finds the arguments of a pipeline call that have no effect: the images are the same without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bitpolicy.sensitivity.calls.caller import Caller
from bitpolicy.sensitivity.calls.form import Form
from bitpolicy.sensitivity.calls.outputs import drawn
from bitpolicy.sensitivity.calls.rehearsal import REFUSALS
from bitpolicy.sensitivity.samples import Sample


def without_effect(caller: Caller, form: Form, sample: Sample, names: Sequence[str]) -> list[str]:
    """The arguments in `names` without which `sample` comes out the same.

    This takes a run of two steps, and one more for each argument. Arguments that make no difference there are tried
    again in runs of full length. The result never includes an argument that equals its default, one that is required,
    or a size that the images have anyway, such as a height of 512 where 512 is usual.
    """
    defaults = caller.signature.defaults
    wanted = [name for name in names if name in caller.call and _differs(caller.call[name], defaults, name)]
    for whole in (False, True):
        if wanted:
            plain = _image(caller, form, sample, whole)
            wanted = [name for name in wanted if not _is_size(caller.call[name], plain)]
            wanted = [name for name in wanted if _same(plain, _image(_without(caller, name), form, sample, whole))]
    return wanted


def _differs(value: Any, defaults: Any, name: str) -> bool:
    return name in defaults and not (type(value) is type(defaults[name]) and value == defaults[name])


def _is_size(value: Any, image: torch.Tensor | None) -> bool:
    return isinstance(value, int) and image is not None and value in image.shape[-2:] + image.shape[:-3]


def _without(caller: Caller, name: str) -> Caller:
    return Caller(caller.pipe, {key: value for key, value in caller.call.items() if key != name})


def _image(caller: Caller, form: Form, sample: Sample, whole: bool) -> torch.Tensor | None:
    """The result of a trial run; None if the pipeline refuses the call."""
    try:
        return drawn(caller.trial([sample], form.writing, form.finished, whole=whole), 1)[0]
    except REFUSALS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)
