"""Small floating-point numbers as codes: e4m3 in a byte, e2m1 in half a byte.

    e4m3   1 sign bit, 4 exponent bits, 3 mantissa bits; largest 448 (Micikevicius et al. 2022, section 3)
    e2m1   1 sign bit, 2 exponent bits, 1 mantissa bit; 0, 0.5, 1, 1.5, 2, 3, 4, 6 (OCP Microscaling Formats
           Specification v1.0, section 5.3.3)

A code is handled as the value that it stands for, in float32. Values between two codes go to the nearest, ties to the
code with an even last bit, values beyond the largest to the largest. Zeros keep their sign.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.formats.packing import pack_bits, packed_length, unpack_bits


class Element(ABC):
    """A number format.

    Attributes:
        name: its exponent and mantissa bits.
        bits: of a code.
        largest: the largest value.
    """

    name: str
    bits: int
    largest: float

    @abstractmethod
    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest value that has a code, float32; NaN stays NaN. May overwrite `values`, float32."""

    @abstractmethod
    def spec(self, out: int, length: int) -> TensorSpec:
        """How the codes of `out` rows of `length` values are stored."""

    @abstractmethod
    def packed(self, codes: torch.Tensor) -> torch.Tensor:
        """The stored codes of values from `nearest`, shape (out, length)."""

    @abstractmethod
    def unpacked(self, stored: torch.Tensor, length: int) -> torch.Tensor:
        """The inverse of `packed`, float32."""


@dataclass(frozen=True)  # equal to its copies
class _E4M3(Element):
    name, bits, largest = "e4m3", 8, 448.0

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        return values.clamp_(-self.largest, self.largest).to(torch.float8_e4m3fn).float()  # torch: larger is NaN

    def spec(self, out: int, length: int) -> TensorSpec:
        return TensorSpec(torch.float8_e4m3fn, (out, length))

    def packed(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.to(torch.float8_e4m3fn).contiguous()

    def unpacked(self, stored: torch.Tensor, length: int) -> torch.Tensor:
        return stored.float()


@dataclass(frozen=True)
class _E2M1(Element):
    name, bits, largest = "e2m1", 4, 6.0
    _SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        size = values.abs().clamp_(max=self.largest)
        apart = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        return (size / apart).round_().mul_(apart).copysign_(values)  # an even multiple is an even code

    def spec(self, out: int, length: int) -> TensorSpec:
        return TensorSpec(torch.uint8, (out, packed_length(length, self.bits)))

    def packed(self, codes: torch.Tensor) -> torch.Tensor:
        size = codes.abs()
        place = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4))
        return pack_bits((place + 8 * codes.signbit()).to(torch.uint8), self.bits)

    def unpacked(self, stored: torch.Tensor, length: int) -> torch.Tensor:
        values = torch.tensor((*self._SIZES, *(-size for size in self._SIZES)), device=stored.device)
        return values[unpack_bits(stored, self.bits, length).int()]


E4M3: Element = _E4M3()
E2M1: Element = _E2M1()
