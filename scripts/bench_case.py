"""A case of the kernel benchmarks: a layer, its input and the number of operations of one call."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from bitpolicy.kernels.kernel import Geometry


@dataclass(frozen=True)
class Case:
    """A layer and its input; convolutions are padded by half the kernel size.

    Attributes:
        input: (rows, in) or (B, in, H, W).
        weight: (out, in, *kernel).
    """

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1

    @property
    def geometry(self) -> Geometry | None:
        kernel = self.weight[2:]
        if not kernel:
            return None
        return Geometry((self.stride,) * len(kernel), tuple(k // 2 for k in kernel), (1,) * len(kernel))

    @property
    def operations(self) -> int:
        """Multiplications and additions of one call."""
        return 2 * self.input[0] * prod(n // self.stride for n in self.input[2:]) * prod(self.weight)

    @property
    def shape(self) -> str:
        x, w = self.input, self.weight
        return f"{x[0]} x {w[1]} -> {w[0]}" if len(w) == 2 else f"{x[0]} x {w[1]} -> {w[0]} at {x[2]}x{x[3]}"
