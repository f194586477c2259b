"""Which kernel each packed layer of a pipeline uses and why, recorded while the pipeline draws one image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bitpolicy.kernels import dispatch
from bitpolicy.kernels.kernel import Compute, Kernel, PackedWeight
from bitpolicy.kernels.layers import HasModules, PackedLayer, packed_layers


@dataclass(frozen=True)
class KernelChoice:
    """The kernel of one layer at its first call.

    Attributes:
        layer: name of the layer.
        format: format of its weight.
        input: shape of its input, including padding if the layer pads.
        dtype: dtype of its input, e.g. "float32".
        compute: compute mode of its product.
        kernel: name of the kernel.
        why: the reason for the choice: "tried: ..." with milliseconds, or why there was nothing to choose.
        passed_over: kernel name -> why it does not accept the call.
    """

    layer: str
    format: str
    input: tuple[int, ...]
    dtype: str
    compute: str
    kernel: str
    why: str
    passed_over: dict[str, str]

    def as_row(self) -> dict[str, Any]:
        """A table row."""
        passed = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over.items())
        return {
            "layer": self.layer,
            "format": self.format,
            "input": "x".join(map(str, self.input)),
            "dtype": self.dtype,
            "compute": self.compute,
            "kernel": self.kernel,
            "why": self.why,
            "passed over": passed,
        }


@contextmanager
def watching(model: HasModules) -> Iterator[dict[str, KernelChoice]]:
    """Inside the block, record the first call of each packed layer under the layer's name."""
    seen: dict[str, KernelChoice] = {}

    def watch(name: str) -> Any:
        def note(layer: PackedLayer, arguments: tuple[Any, ...]) -> None:
            if name not in seen:
                with torch.no_grad():
                    seen[name] = _choice(name, layer, arguments[0])

        return note

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in packed_layers(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _choice(name: str, layer: PackedLayer, input: torch.Tensor) -> KernelChoice:
    x, weight, bias, compute = layer.call(input)
    kernel = dispatch.choose(x, weight, bias, compute)
    refusals = {row.kernel.name: reason for row, reason in dispatch.explained(x, weight, compute) if reason}
    dtype = str(x.dtype).removeprefix("torch.")
    why = _why(kernel, x, weight, bias, compute)
    return KernelChoice(name, weight.format.name, tuple(x.shape), dtype, str(compute), kernel.name, why, refusals)


def _why(kernel: Kernel, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, compute: Compute) -> str:
    asked = dispatch.mode()
    if asked != dispatch.AUTO:
        return f"{asked} was requested"
    able = dispatch.takers(x, weight, compute)
    if len(able) == 1:
        return "the only candidate"
    if able[0].settled:
        return "does less work than any other"
    times = dispatch.tried(x, weight, bias, compute)
    if not times:
        return "the first candidate; none was timed"
    timings = (f"{name} {'wrong' if ms is None else f'{ms:.3g} ms'}" for name, ms in times.items())
    fastest = min((ms for ms in times.values() if ms is not None), default=0.0)
    spares = kernel.thrifty and (times.get(kernel.name) or 0.0) > fastest
    return f"tried: {', '.join(timings)}" + ("; about as fast, and needs less memory" if spares else "")
