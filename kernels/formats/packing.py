"""The storage layout of packed weights (checkpoint `format_version: 1`).

A weight of shape (out, in/groups, *kernel) becomes rows (out, K) with K = prod(kernel) * in/groups, channels fastest:
(out, kh, kw, in/groups). The codes of a row form one little-endian bit stream, with the lowest bit of the first code in
the lowest bit of the first byte, padded with zeros to whole bytes. Two 4-bit codes share a byte, the even k in the low
nibble; eight 3-bit codes fill three bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.nn.functional import pad


def to_rows(weight: torch.Tensor) -> torch.Tensor:
    """(out, in/groups, *kernel) -> (out, K), channels fastest."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def from_rows(rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(out, K), channels fastest -> contiguous (out, in/groups, *kernel)."""
    out, channels, *kernel = shape
    weight = rows.reshape(out, *kernel, channels).movedim(-1, 1).contiguous()
    return weight.flatten().view(tuple(shape))  # resets the channels-last strides of dimensions of size 1


def row_length(shape: Sequence[int]) -> int:
    """K: the number of weights in one output channel."""
    return prod(shape[1:])


def packed_length(length: int, bits: int) -> int:
    """Bytes of a row of `length` codes."""
    return -(-length * bits // 8)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """u8 codes (out, K) in [0, 2^bits - 1] -> u8 (out, ceil(K bits / 8))."""
    length = codes.shape[-1]
    per_block = 8 // bits if 8 % bits == 0 else 8  # the fewest codes that fill whole bytes
    blocks = pad(codes, (0, -length % per_block)).unflatten(-1, (-1, per_block))
    if 8 % bits == 0:
        packed = blocks[..., 0].clone()
        for i in range(1, per_block):
            packed |= blocks[..., i] << (i * bits)
        return packed.contiguous()
    words = (blocks.long() << _shifts(per_block, bits, codes.device)).sum(-1, keepdim=True)
    stream = (words >> _shifts(bits, 8, codes.device)).to(torch.uint8).flatten(-2)
    return stream[..., : packed_length(length, bits)].contiguous()


def unpack_bits(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """u8 (out, ceil(length bits / 8)) -> u8 codes (out, length)."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    if 8 % bits == 0:
        parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(-2)[..., :length]
    blocks = pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).long()
    words = (blocks << _shifts(bits, 8, packed.device)).sum(-1, keepdim=True)
    return ((words >> _shifts(8, bits, packed.device)) & mask).to(torch.uint8).flatten(-2)[..., :length]


def _shifts(count: int, step: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device) * step
