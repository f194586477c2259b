"""SDNQ: codes are packed in its layout, and each piece of a group has its group's scale."""

from __future__ import annotations

import math
import os

import pytest
import torch

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.policies.exporters.exporter import Layer
from bitpolicy.policies.exporters.sdnq import Sdnq
from bitpolicy.policies.exporters.sdnq_packing import codes_per_block, pack_blocks, packed_shape


@pytest.mark.parametrize("bits", range(2, 8))
def test_sdnq_unpacks_our_codes(bits: int) -> None:
    os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"
    packed_int = pytest.importorskip("sdnq.packed_int", reason="pip install sdnq")
    codes = torch.randint(0, 2**bits, (16, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack_blocks(codes, bits)
    assert torch.equal(packed_int.unpack_int(packed, f"uint{bits}", codes.shape), codes)
    assert torch.equal(packed, packed_int.pack_int(codes, f"uint{bits}"))


@pytest.mark.parametrize("bits", range(2, 8))
def test_every_bit_of_a_block_belongs_to_one_bit_of_a_code(bits: int) -> None:
    """Each bit of each code sets a different bit of the block."""
    count = codes_per_block(bits)
    seen = set()
    for code in range(count):
        for bit in range(bits):
            codes = torch.zeros(count, dtype=torch.uint8)
            codes[code] = 1 << bit
            packed = pack_blocks(codes, bits).flatten()
            (byte,) = packed.nonzero().flatten().tolist()
            seen.add((byte, int(packed[byte])))
    assert len(seen) == count * bits == 8 * math.prod(packed_shape(count, bits))
    assert {value.bit_count() for _, value in seen} == {1}


@pytest.mark.parametrize(
    ("shape", "name", "group"),
    [
        ((8, 128), "int4", 64),
        ((8, 64), "int4", -1),
        ((8, 96), "int4", 32),
        ((8, 96), "int4-channel", -1),
        ((8, 320, 3, 3), "int4", 64),
        ((8, 32, 3, 3), "int4", -1),
        ((8, 48, 3, 3), "int5", 16),
        ((8, 48, 3, 3), "int8", -1),
    ],
)
def test_runs_are_the_longest_that_no_group_boundary_cuts(shape: tuple[int, ...], name: str, group: int) -> None:
    layer = Layer("a", "Conv2d" if len(shape) > 2 else "Linear", shape, format_named(name))
    assert Sdnq().group(layer) == group


@pytest.mark.parametrize(
    ("shape", "name", "held"),
    [
        ((8, 4, 3, 3), "int4", True),
        ((8, 4, 3, 3), "int8", True),
        ((8, 320, 3, 3), "int4", True),
        ((3, 5), "int3-channel", False),  # no whole blocks of eight codes
        ((8, 128), "int4-rot", False),
        ((8, 128), "nf4", False),
        ((8, 128), "fp8", True),
        ((8, 128, 3), "int2", True),
    ],
)
def test_sdnq_holds_what_it_stores_exactly(shape: tuple[int, ...], name: str, held: bool) -> None:
    kind = {2: "Linear", 3: "Conv1d", 4: "Conv2d"}[len(shape)]
    assert Sdnq().holds(Layer("a", kind, shape, format_named(name))) == held
