"""Sketches: dot products of gradients with weight changes, taken during or right after a backward pass.

Each gradient is freed as soon as it is multiplied, or added to the sum of its layer's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from bitpolicy.kernels.layers import Quantizable
from bitpolicy.sensitivity.sketches.weight_changes import WeightChanges
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

Products = Callable[[str, torch.Tensor], torch.Tensor]
"""Dot products, shape (candidates), of a layer's change with a gradient."""


@dataclass(frozen=True)
class Sketch:
    """The result of one backward pass: every layer's error along one probe vector.

    Attributes:
        weight: <G_W, dW>, float32, shape (rows, layers, candidates). A sketch of the whole trajectory has one row. A
            sketch by step has one per scheduler step and, if models outside the loop are studied, one for them before.
        bias: <G_b, db> of the corrected bias, same shape; zero for a layer without a bias.
        along: <v, x_0> / |x_0|, the component of the probe vector along the signal.
        inputs: <g, Q(x) - x> of the layers whose inputs are rounded, same shape, equal for all candidates that fit and
            round inputs; None if no layer's inputs are rounded.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    along: float = 0.0
    inputs: torch.Tensor | None = None

    @property
    def plain(self) -> torch.Tensor:
        """<v, dx_0> with the unchanged bias, shape of `weight`."""
        return self.weight if self.inputs is None else self.weight + self.inputs

    @property
    def corrected(self) -> torch.Tensor:
        """The same with the corrected bias."""
        return self.plain + self.bias

    def stacked(self) -> torch.Tensor:
        """With the bias unchanged, then corrected, shape (2, steps, layers, candidates)."""
        return torch.stack([self.plain, self.corrected])

    def rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Sketch:
        """The sketch with `change` applied to the rows of every tensor."""
        inputs = None if self.inputs is None else change(self.inputs)
        return replace(self, weight=change(self.weight), bias=change(self.bias), inputs=inputs)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a record."""
        inputs = {} if self.inputs is None else {"inputs": self.inputs}
        return {"weight": self.weight, "bias": self.bias, "along": torch.tensor(self.along), **inputs}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Sketch:
        return cls(tensors["weight"], tensors["bias"], float(tensors.get("along", 0.0)), tensors.get("inputs"))


def equally_long(sketches: Sequence[Sketch]) -> list[Sketch]:
    """The sketches padded with zeros to the longest: a request may set its own number of steps."""
    steps = max(len(sketch.weight) for sketch in sketches)

    def longer(values: torch.Tensor) -> torch.Tensor:
        return pad(values, (0, 0, 0, 0, 0, steps - len(values)))

    return [sketch.rows(longer) for sketch in sketches]


class SketchRecorder:
    """Fills sketches from the gradients of a backward pass.

    Attributes:
        step: the scheduler step that gradients now belong to. The code that runs the backward pass sets it.
        reached: steps at which a gradient arrived.
        reached_outside: components outside the loop at which a gradient arrived.
        lead: in sketches by step, rows before that of the first step: 1 if a component outside the loop is studied,
            else 0.

    Args:
        summed: the layers whose weights' gradients are summed before they are multiplied; None for sketches by step.
        outside: layer name -> component, for the layers outside the loop.
        amounts: layer name -> the amount of input rounding, for the layers that have one.
    """

    def __init__(
        self,
        layers: Mapping[str, Quantizable],
        changes: WeightChanges,
        candidates: int,
        summed: Collection[str] | None,
        outside: Mapping[str, str],
        amounts: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self._layers, self._changes, self._candidates, self._amounts = layers, changes, candidates, amounts
        self.step = 0
        self.reached: set[int] = set()
        self.reached_outside: set[str] = set()
        self.lead = int(bool(outside))
        self._outside, self._summed = outside, summed
        self._sums: dict[str, torch.Tensor] = {}
        self._weight = self._bias = self._inputs = torch.empty(0)

    @contextmanager
    def recording(self, steps: int, device: torch.device) -> Iterator[None]:
        """While the block runs, complete gradients go into a new sketch of `steps` steps. It is whole afterwards."""
        rows = 1 if self._summed is not None else self.lead + steps
        self._weight = torch.zeros(rows, len(self._layers), self._candidates, device=device)
        self._bias, self._inputs = torch.zeros_like(self._weight), torch.zeros_like(self._weight)
        self.reached, self.reached_outside = set(), set()
        handles = list(self._hooks())
        try:
            yield
            for index, name in enumerate(self._layers):
                if name in self._sums:
                    products = self._changes.weight_products(name, self._sums.pop(name))
                    self._weight[0, index] += products.to(device)
        finally:
            self._sums.clear()
            for handle in handles:
                handle.remove()

    def not_finite(self) -> str | None:
        """Where the backward pass first met NaN or Inf, in words; None if it did not."""
        bad = ~torch.isfinite(torch.stack([self._weight, self._bias, self._inputs])).all(0).all(-1)
        if not bad.any():
            return None
        row, layer = max(bad.nonzero().tolist())  # the backward pass starts at the last step and the last layer
        found = f"the gradient of {list(self._layers)[layer]} is NaN or Inf"
        if self._summed is not None:
            return found
        return f"{'outside the loop' if row < self.lead else f'step {row - self.lead + 1}'}: {found}"

    def sketch(self, scale: float = 1.0, along: float = 0.0) -> Sketch:
        """What was recorded, divided by `scale`, on the CPU."""
        inputs = (self._inputs / scale).cpu() if self._amounts else None
        return Sketch((self._weight / scale).cpu(), (self._bias / scale).cpu(), along, inputs)

    def _hooks(self) -> Iterator[Any]:
        for index, (name, layer) in enumerate(self._layers.items()):
            changes = self._changes
            if name in (self._summed or ()):
                yield layer.weight.register_post_accumulate_grad_hook(partial(self._add, name))
            else:
                yield self._hook(layer.weight, changes.weight_products, self._weight, index, name)
            if layer.bias is not None:
                yield self._hook(layer.bias, changes.bias_products, self._bias, index, name)
            if name in self._amounts:
                yield self._hook(self._amounts[name], changes.input_products, self._inputs, index, name)

    def _hook(self, leaf: torch.Tensor, products: Products, into: torch.Tensor, index: int, name: str) -> Any:
        def use_and_free(leaf: torch.Tensor) -> None:
            gradient = leaf.grad
            assert gradient is not None
            into[self._row(name), index] += products(name, gradient).to(into.device)
            leaf.grad = None

        return leaf.register_post_accumulate_grad_hook(use_and_free)

    def _add(self, name: str, weight: torch.Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None
        self._row(name)
        if name in self._sums:
            self._sums[name].add_(gradient)
        else:
            self._sums[name] = gradient.float()
        weight.grad = None

    def _row(self, name: str) -> int:
        """The row for a gradient of the layer that arrives now."""
        if name in self._outside:
            self.reached_outside.add(self._outside[name])
            return 0
        self.reached.add(self.step)
        return self.lead + self.step if self._summed is None else 0


@contextmanager
def only_these_require_grad(trajectories: Trajectories, layers: Mapping[str, Quantizable]) -> Iterator[None]:
    """Freeze the pipeline except for the weights and biases of `layers`, and restore it afterwards."""
    modules = [module for module in trajectories.pipe.components.values() if isinstance(module, nn.Module)]
    before = {parameter: parameter.requires_grad for module in modules for parameter in module.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for layer in layers.values():
            layer.weight.requires_grad_(True)
            if layer.bias is not None:
                layer.bias.requires_grad_(True)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
