"""How SDNQ packs codes of 2 to 7 bits into bytes (sdnq/packed_int/pack.py).

Codes are packed in blocks that fill whole bytes. The first codes of a block are in the low bits of its bytes. The bits
of the others fill the space above them. Each entry of `_SPREAD` describes one piece: (byte, code, lowest bit taken from
the code, number of bits, position in the byte).
"""

from __future__ import annotations

import torch

_BLOCK = {2: (4, 1), 3: (8, 3), 4: (2, 1), 5: (8, 5), 6: (4, 3), 7: (8, 7)}
"""Bits -> codes and bytes per block."""
_SPREAD: dict[int, tuple[tuple[int, int, int, int, int], ...]] = {
    2: ((0, 1, 0, 2, 2), (0, 2, 0, 2, 4), (0, 3, 0, 2, 6)),
    3: (
        *((i, 3 + i, 0, 3, 3) for i in range(3)),
        *((0, 6, 0, 2, 6), (1, 7, 0, 2, 6), (2, 6, 2, 1, 6), (2, 7, 2, 1, 7)),
    ),
    4: ((0, 1, 0, 4, 4),),
    5: (
        *((i, 5 + i, 0, 3, 5) for i in range(3)),
        *((3, 5, 3, 2, 5), (4, 6, 3, 2, 5), (3, 7, 4, 1, 7), (4, 7, 3, 1, 7)),
    ),
    6: ((0, 3, 4, 2, 6), (1, 3, 2, 2, 6), (2, 3, 0, 2, 6)),
    7: tuple((i, 7, 6 - i, 1, 7) for i in range(7)),
}


def codes_per_block(bits: int) -> int:
    """The number of codes that fill whole bytes; 1 for 8 bits."""
    return _BLOCK[bits][0] if bits in _BLOCK else 1


def packed_shape(codes: int, bits: int) -> tuple[int, ...]:
    """Shape of packed codes of 2 to 7 bits: (blocks, bytes per block), or (blocks,) if a block is one byte."""
    count, length = _BLOCK[bits]
    return (codes // count, length)[: 2 if length > 1 else 1]


def pack_blocks(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes in [0, 2^bits - 1], u8, of any shape that fills whole blocks -> u8, of `packed_shape`."""
    count, length = _BLOCK[bits]
    blocks = codes.reshape(-1, count).int()
    packed = blocks[:, :length].clone()
    for byte, code, low, width, place in _SPREAD[bits]:
        packed[:, byte] |= ((blocks[:, code] >> low) & (2**width - 1)) << place
    return packed.to(torch.uint8).reshape(packed_shape(codes.numel(), bits))
