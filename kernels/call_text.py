"""One line of text that describes everything about a call of the operator except its tensors.

    int4 64x32x3x3 int8 stride=1x1 padding=1x1 dilation=1x1 groups=1 low-memory

The line gives the format's name, the weight's shape, the compute mode, the geometry of a convolution, and whether
prepared layouts are forbidden. At each call, torch converts every argument of an operator to an object of its own and
back. For lists of numbers, this takes as long as everything else between a compiled model and a kernel; for text, it
takes a tenth of that. Text is also a cheap lookup key, and it is readable in what a compiler prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Compute, Geometry, PackedWeight

_LOW_MEMORY = "low-memory"


@dataclass(frozen=True)
class Call:
    """A parsed line.

    Attributes:
        suffixes: of the weight's tensors, in the order in which the operator gets them.
        compute: what the product may round.
    """

    weight: PackedWeight
    suffixes: tuple[str, ...]
    compute: Compute

    def holding(self, tensors: Sequence[torch.Tensor]) -> PackedWeight:
        """The weight with these tensors. The call itself keeps no reference to them."""
        return self.weight.holding(dict(zip(self.suffixes, tensors, strict=True)))


def in_words(weight: PackedWeight, compute: Compute) -> str:
    """The line that describes a call."""
    words = [weight.format.name, _numbers(weight.shape), compute.value]
    g = weight.geometry
    if g is not None:
        slides = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation, "groups": (g.groups,)}
        words += [f"{name}={_numbers(each)}" for name, each in slides.items()]
    return " ".join([*words, _LOW_MEMORY] if weight.low_memory else words)


@cache  # at most one entry for each kind of layer
def read(text: str) -> Call:
    """Parse a line."""
    name, shape, compute, *more = text.split()
    format, sizes = format_named(name), _sizes(shape)
    slides = dict(word.split("=") for word in more if word != _LOW_MEMORY)
    geometry = None
    if slides:
        stride, padding, dilation = (_sizes(slides[each]) for each in ("stride", "padding", "dilation"))
        geometry = Geometry(stride, padding, dilation, int(slides["groups"]))
    weight = PackedWeight(format, sizes, {}, geometry, _LOW_MEMORY in more)
    weight.kind  # noqa: B018 - computed once here and copied by `holding`
    return Call(weight, tuple(format.tensors(sizes, torch.float16)), Compute(compute))


def _numbers(numbers: Sequence[int]) -> str:
    return "x".join(str(int(n)) for n in numbers)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))
