"""Quantization of inputs by Triton, checked in its interpreter: run like triton_interpreted.py."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from toy_inputs import FLOAT8, SIGNS, any_code, any_sign_and_code, inputs

from bitpolicy.kernels.compute import fp8 as fp8_compute
from bitpolicy.kernels.compute.int8 import input_grid, quantize_input
from bitpolicy.kernels.triton import input as triton_input


def assert_as_defined(made: triton_input.Quantized, x: torch.Tensor, dims: tuple[int, ...]) -> None:
    """x_q - z, s_x and z of an input, whose channels the kernels write last; x_q and s_x for float8."""
    last = (lambda t: t) if dims == (-1,) else (lambda t: t.movedim(1, -1))
    assert made.codes.is_contiguous()
    if made.codes.dtype == FLOAT8:
        codes, s_x = fp8_compute.quantize_input(x, dims)
        assert made.zero is None
        assert torch.equal(made.scale, s_x.flatten())
        assert torch.equal(made.codes.view(last(x).shape).float(), last(codes))
        return
    steps, s_x = quantize_input(x, dims)
    zero = input_grid(x, dims)[1]
    assert (made.codes.dtype, made.scale.dtype, made.zero.dtype) == (torch.int8, torch.float32, torch.int32)
    assert torch.equal(made.scale, s_x.flatten())
    assert torch.equal(made.zero.float(), zero.flatten() - 128)
    codes = made.codes.view(last(x).shape).float()
    assert torch.equal(codes - made.zero.view(last(s_x).shape), last(steps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [7, 64, 1000, 20000])
@any_sign_and_code
def test_rows_are_quantized_as_defined(dtype: torch.dtype, length: int, sign: str, code: torch.dtype) -> None:
    x = SIGNS[sign](inputs(3, 2, length)).to(dtype) * torch.tensor([1e-4, 1, 30]).view(3, 1, 1).to(dtype)
    x[1, 1] = 0
    assert_as_defined(triton_input.quantized(x, (-1,), (), code), x, (-1,))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "each"),
    [
        *product([(3, 5, 9), (2, 70, 2, 7), (2, 3, 2, 3, 4)], ["pixel"]),  # one program each, which is slow here
        *product([(3, 5, 9), (2, 70, 9, 13), (2, 3, 4, 5, 6), (1, 40, 33, 32)], ["sample"]),
    ],
)
@any_sign_and_code
def test_pixels_and_samples_are_quantized_as_defined_and_stored_channels_last(
    shape: tuple[int, ...], channels_last: bool, each: str, sign: str, code: torch.dtype
) -> None:
    x = SIGNS[sign](inputs(*shape))
    x[0] *= 100
    x[:, :, 1] = 0
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    dims = (1,) if each == "pixel" else tuple(range(1, x.ndim))
    assert_as_defined(triton_input.quantized(x, dims, (), code), x, dims)


@pytest.mark.parametrize("padding", [(2,), (1, 2), (0, 3), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@any_sign_and_code
def test_padding_has_the_code_of_zero(
    padding: tuple[int, ...], channels_last: bool, sign: str, code: torch.dtype
) -> None:
    x = SIGNS[sign](inputs(2, 70, *(5, 9, 4)[: len(padding)]))
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    around = torch.nn.functional.pad(x, [n for pad in reversed(padding) for n in (pad, pad)])
    dims = tuple(range(1, x.ndim))
    assert_as_defined(triton_input.quantized(x, dims, padding, code), around, dims)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@any_code
def test_a_non_finite_row_or_sample_has_no_scale(value: float, code: torch.dtype) -> None:
    x = inputs(3, 4, 65)
    x[1, 2, 64] = value
    rows = triton_input.quantized(x, (-1,), (), code).scale.view(3, 4)
    assert torch.isnan(rows).nonzero().tolist() == [[1, 2]]
    few = x[..., 60:].contiguous()
    for arranged in (few, few.movedim(1, -1).contiguous().movedim(-1, 1)):
        pixels = triton_input.quantized(arranged, (1,), (), code).scale.view(3, 5)
        assert torch.isnan(pixels).nonzero().tolist() == [[1, 4]]
    for arranged in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        samples = triton_input.quantized(arranged, (1, 2), (), code).scale
        assert torch.isnan(samples).tolist() == [False, True, False]


def test_float8_rounds_to_nearest_at_and_around_ties() -> None:
    levels = torch.arange(0x7F, dtype=torch.uint8).view(FLOAT8).float()  # all positive ones, up to 448
    ties = (levels[1:] + levels[:-1]) / 2
    neighbours = [torch.nextafter(ties, torch.tensor(towards)) for towards in (0.0, 1e3)]
    values = torch.cat([levels, ties, *neighbours, torch.logspace(-12, 2.6, 3000)])
    x = torch.cat([torch.tensor([448.0]), values, -values])[None]  # so that the scale is 1
    made = triton_input.quantized(x, (-1,), (), FLOAT8)
    assert made.scale.tolist() == [1.0]
    assert torch.equal(made.codes.view(torch.uint8), x.to(FLOAT8).view(torch.uint8))


def test_float8_with_a_one_bit_scale_is_at_most_448() -> None:
    x = torch.tensor([[600.0, -600.0, 100.0], [1.0, 0.0, -1.0]]) * 2.0**-149
    assert_as_defined(triton_input.quantized(x, (-1,), (), FLOAT8), x, (-1,))


def test_int8_and_float8_codes_are_not_mixed_up() -> None:
    x = inputs(3, 64)
    for code in (torch.int8, FLOAT8, torch.int8):
        assert triton_input.quantized(x, (-1,), (), code).codes.dtype == code


def test_a_zero_point_is_a_valid_code_with_a_one_bit_scale() -> None:
    least = 2.0**-149
    x = torch.tensor([[-380 * least, 0.0], [0.0, 380 * least], [-least, least]])
    assert (-x[0, 0] / least).round() == 380
    assert_as_defined(triton_input.quantized(x, (-1,)), x, (-1,))
    assert triton_input.quantized(x, (-1,)).zero[0] == 127


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_sign_of_nan_does_not_matter(sign: float) -> None:
    x = inputs(2, 33)
    x[0, 5] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
    assert torch.isnan(triton_input.quantized(x, (-1,)).scale).tolist() == [True, False]
