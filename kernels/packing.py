"""The wire order of packed weights (checkpoint `format_version: 1`).

A weight of shape (out, in/groups, *kernel) is laid out as rows (out, K) with K = prod(kernel) * in/groups and the
channel running fastest: (out, kh, kw, in/groups). Two 4-bit codes share a byte, the even k in the low nibble; an odd K
is padded by one zero nibble.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch


def to_rows(weight: torch.Tensor) -> torch.Tensor:
    """(out, in/groups, *kernel) -> (out, K), channels fastest."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def from_rows(rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(out, K), channels fastest -> contiguous (out, in/groups, *kernel)."""
    out, channels, *kernel = shape
    weight = rows.reshape(out, *kernel, channels).movedim(-1, 1).contiguous()
    return weight.flatten().view(tuple(shape))  # along a dimension of 1 the strides are still those of channels-last


def row_length(shape: Sequence[int]) -> int:
    """K: how many weights one output channel has."""
    return prod(shape[1:])


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """u8 codes (out, K) in [0, 15] -> u8 (out, ceil(K/2))."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).contiguous()


def unpack_nibbles(packed: torch.Tensor, length: int) -> torch.Tensor:
    """u8 (out, ceil(length/2)) -> u8 codes (out, length)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :length]
