"""The bytes of `format_version: 1`, worked out by hand. People keep files of them: a failure here is no detail."""

from __future__ import annotations

import pytest
import torch

from bitpolicy.kernels.formats import format_named
from bitpolicy.kernels.packing import from_rows, pack_nibbles, row_length, to_rows, unpack_nibbles


def stored(name: str, weight: torch.Tensor) -> dict[str, list]:
    return {suffix: tensor.tolist() for suffix, tensor in format_named(name).quantize(weight).items()}


def test_the_even_weight_lies_in_the_low_nibble() -> None:
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
def test_the_name_tells_the_group(name: str, group: int) -> None:
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
def test_rows_and_back_is_the_same_weight(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    rows = to_rows(weight)
    assert rows.shape == (shape[0], row_length(shape))
    assert torch.equal(from_rows(rows, shape), weight)


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_packed_codes_come_back(length: int) -> None:
    codes = torch.arange(3 * length, dtype=torch.uint8).reshape(3, length) % 16
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), length), codes)
