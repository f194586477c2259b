"""The bytes of `format_version: 1`, computed by hand. A failure here breaks files that users already have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm
from toy_formats import NF4_LEVELS

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.formats.packing import from_rows, pack_bits, packed_length, row_length, to_rows, unpack_bits


def stored(name: str, weight: torch.Tensor) -> dict[str, list]:
    """The stored numbers as lists; the bytes for float8."""
    tensors = format_named(name).quantize(weight)
    return {
        suffix: (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor).tolist()
        for suffix, tensor in tensors.items()
    }


def test_the_even_weight_is_in_the_low_nibble() -> None:
    assert stored("int4", torch.arange(16.0)[None]) == {
        "weight_packed": [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]],
        "weight_scale": [[1.0]],
        "weight_zero": [[0]],
    }


def test_a_zero_point_is_the_code_of_zero() -> None:
    assert stored("int4", torch.tensor([[-10.0, 0.0, 20.0, 1.9]])) == {
        "weight_packed": [[0x50, 0x6F]],
        "weight_scale": [[2.0]],
        "weight_zero": [[5]],
    }


def test_an_odd_row_ends_in_a_nibble_of_zero() -> None:
    assert stored("int4", torch.tensor([[0.0, 15.0, 15.0], [0.0, 15.0, 3.0]]))["weight_packed"] == [
        [0xF0, 0x0F],
        [0xF0, 0x03],
    ]


def test_channels_run_fastest_and_the_last_kernel_axis_next() -> None:
    codes = torch.tensor([0.0, 15.0, 1, 2, 3, 4, 5, 6]).reshape(1, 2, 2, 2)  # (channel, kh, kw) = code
    # in order (kh, kw, channel): 000 100 001 101 010 110 011 111
    assert stored("int4", codes)["weight_packed"] == [[3 << 4 | 0, 4 << 4 | 15, 5 << 4 | 1, 6 << 4 | 2]]


def test_a_scale_belongs_to_64_weights_and_the_last_group_may_be_short() -> None:
    weight = torch.cat([torch.full((64,), 15.0), torch.full((64,), 30.0), torch.full((2,), -60.0)])[None]
    tensors = stored("int4", weight)
    assert tensors["weight_scale"] == [[1.0, 2.0, 4.0]]
    assert tensors["weight_zero"] == [[0, 0, 15]]
    assert tensors["weight_packed"] == [[0xFF] * 64 + [0x00]]


def test_a_short_group_is_not_stretched_by_its_padding() -> None:
    weight = torch.cat([torch.zeros(64), torch.tensor([6.0, 7.5])])[None]
    assert stored("int4", weight)["weight_scale"] == [[1.0, 0.5]]


def test_a_group_never_reaches_into_the_next_row() -> None:
    assert stored("int4", torch.tensor([[15.0] * 3, [150.0] * 3]))["weight_scale"] == [[1.0], [10.0]]


@pytest.mark.parametrize(("name", "group"), [("int4-g32", 32), ("int4", 64), ("int4-g128", 128)])
def test_the_name_gives_the_group_size(name: str, group: int) -> None:
    weight = torch.cat([torch.full((group,), 15.0), torch.full((1,), 30.0)])[None]
    assert stored(name, weight)["weight_scale"] == [[1.0, 2.0]]


def test_int8_keeps_the_shape_and_has_a_scale_for_each_output_channel() -> None:
    weight = torch.tensor([[127.0, -127, 3], [254, -2, 1]]).reshape(2, 1, 3)
    assert stored("int8", weight) == {
        "weight_packed": [[[127, -127, 3]], [[127, -1, 0]]],
        "weight_scale": [1.0, 2.0],
    }


def test_int8_does_not_use_the_code_without_a_counterpart() -> None:
    codes = format_named("int8").quantize(torch.tensor([[-1.0, 0.5], [-3e-45, 0.0]]))["weight_packed"]
    assert codes.min() >= -127


def test_fp16_is_the_weight_itself() -> None:
    weight = torch.randn(3, 4).half()
    assert torch.equal(format_named("fp16").quantize(weight)["weight"], weight)


@pytest.mark.parametrize("shape", [(2, 5), (3, 4, 3), (2, 3, 2, 4), (2, 3, 2, 4, 3)], ids=str)
def test_conversion_to_rows_round_trips(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    rows = to_rows(weight)
    assert rows.shape == (shape[0], row_length(shape))
    assert torch.equal(from_rows(rows, shape), weight)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_row_is_one_number_with_its_first_code_lowest(bits: int) -> None:
    for length in (1, 2, 3, 7, 8, 9, 15, 16, 64, 101):
        codes = torch.randint(2**bits, (3, length), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
        packed = pack_bits(codes, bits)
        numbers = [sum(code << (k * bits) for k, code in enumerate(row)) for row in codes.tolist()]
        nbytes = (length * bits + 7) // 8
        assert packed_length(length, bits) == nbytes, length
        assert packed.shape == (3, nbytes), length
        assert packed.is_contiguous(), length
        assert [bytes(row.tolist()) for row in packed] == [n.to_bytes(nbytes, "little") for n in numbers], length
        assert torch.equal(unpack_bits(packed, bits, length), codes), length


def test_eight_codes_of_three_bits_fill_three_bytes() -> None:
    assert stored("int3", torch.arange(8.0)[None]) == {
        "weight_packed": [[0b10_001_000, 0b1_100_011_0, 0b111_110_10]],  # 000 001 01,0 011 100 1,01 110 111
        "weight_scale": [[1.0]],
        "weight_zero": [[0]],
    }


@pytest.mark.parametrize(
    ("name", "weight", "packed"),
    [
        ("int2", [0, 1, 2, 3], [0b11_10_01_00]),
        ("int2", [3, 0, 0, 0, 2], [0b00_00_00_11, 0b10]),
        ("int3", [7, 0, 1], [0b01_000_111, 0b0]),
        ("int5", [31, 0, 1, 2], [0b000_11111, 0b0_00001_00, 0b0001]),
        ("int6", [63, 0, 1, 2], [0b00_111111, 0b0001_0000, 0b000010_00]),
        ("int7", [127, 0, 1], [0b0_1111111, 0b01_000000, 0b00000]),
        ("int8-g64-asym", [255, 0, 1], [255, 0, 1]),
    ],
)
def test_codes_of_every_width_follow_each_other_without_a_gap(name: str, weight: list[int], packed: list[int]) -> None:
    tensors = stored(name, torch.tensor([weight]).float())
    assert tensors == {"weight_packed": [packed], "weight_scale": [[1.0]], "weight_zero": [[0]]}


def test_an_asymmetric_grid_of_eight_bits_has_a_zero_point_in_a_byte() -> None:
    expected = {"weight_packed": [[0, 255, 200, 203]], "weight_scale": [[0.5]], "weight_zero": [[200]]}
    for name in ("int8-asym", "int8-g32-asym"):
        assert stored(name, torch.tensor([[-100.0, 27.5, 0.0, 1.5]])) == expected


def test_without_a_zero_point_zero_is_the_middle_code_and_the_largest_weight_code_zero() -> None:
    assert stored("int4-sym", torch.tensor([[-8.0, 7.0, 0.0, 1.0]])) == {
        "weight_packed": [[0xF0, 0x98]],
        "weight_scale": [[1.0]],
    }
    assert stored("int4-sym", torch.tensor([[8.0, -7.0, 0.0, 1.0]])) == {
        "weight_packed": [[0xF0, 0x78]],
        "weight_scale": [[-1.0]],
    }
    assert stored("int8-g64", torch.tensor([[-64.0, 63.5, 0.0, 1.0]])) == {
        "weight_packed": [[0, 255, 128, 130]],
        "weight_scale": [[0.5]],
    }
    assert stored("int2-channel-sym", torch.tensor([[-4.0, 2.0, 0.0, -2.0]])) == {
        "weight_packed": [[0b01_10_11_00]],
        "weight_scale": [[2.0]],
    }


def test_the_weight_opposite_to_the_largest_is_clipped_to_the_last_level() -> None:
    tensors = stored("int4-sym", torch.tensor([[-8.0, 8.0]]))
    assert tensors == {"weight_packed": [[0xF0]], "weight_scale": [[1.0]]}


def test_one_scale_for_each_output_channel_reaches_over_the_whole_row() -> None:
    weight = torch.zeros(2, 200)
    weight[0, 199], weight[1, 0], weight[1, 199] = 15.0, -30.0, 15.0
    tensors = stored("int4-channel", weight)
    assert tensors["weight_scale"] == [[1.0], [3.0]]
    assert tensors["weight_zero"] == [[0], [10]]


def test_rotation_multiplies_each_group_by_sylvesters_matrix() -> None:
    weight = torch.zeros(3, 64)
    weight[0] = 1.0  # the first row of the matrix is constant: everything goes to the first position, times sqrt(64)
    weight[1, 0] = 8.0  # and the reverse
    weight[2, 1] = 8.0  # the second row alternates
    tensors = stored("int4-sym-rot", weight)
    assert tensors["weight_scale"] == [[-1.0], [-0.125], [0.125]]
    assert tensors["weight_packed"] == [[0x80] + [0x88] * 31, [0x00] * 32, [0x0F] * 32]


def test_fp8_is_e4m3_with_the_largest_weight_of_a_channel_at_448() -> None:
    weight = torch.tensor([[448.0, -1.0, 0.5, 0.0], [896.0, 2.0, 2.0**-8, -3.5]]).reshape(2, 2, 1, 2)
    assert stored("fp8", weight) == {
        "weight_packed": [[[[0x7E, 0xB8]], [[0x30, 0x00]]], [[[0x7E, 0x38]], [[0x01, 0xBE]]]],
        "weight_scale": [1.0, 2.0],
    }


def test_nf4_codes_are_levels_of_a_normal_distribution_up_to_the_scale() -> None:
    assert stored("nf4", torch.tensor([[2.0, -2.0, 0.0, 2 * 0.0796]])) == {
        "weight_packed": [[0x0F, 0x87]],
        "weight_scale": [[2.0]],
    }
    every = torch.tensor([NF4_LEVELS])
    assert stored("nf4", every)["weight_packed"] == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    back = format_named("nf4").dequantize(format_named("nf4").quantize(every), (1, 16), torch.float32)
    assert torch.equal(back, every)


def test_the_levels_of_nf4_hold_equal_shares_of_a_normal_distribution() -> None:
    """The construction of bitsandbytes' create_normal_map, from quantiles."""
    positive = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    expected = np.sort([*positive, 0.0, *negative]) / positive.max()
    np.testing.assert_allclose(NF4_LEVELS, expected, atol=1e-6)
