"""The definition of FP8 activation quantization, against float64, and the guarantees of its codes and scales."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from toy_products import SHAPES, bias_of, input_of, weight_of

from bitpolicy.kernels.compute import int8 as int8_compute
from bitpolicy.kernels.compute.fp8 import fp8_product, quantize_input, suits
from bitpolicy.kernels.compute.int8 import multiply, shared
from bitpolicy.kernels.kernel import PackedWeight

Quantize = Callable[[torch.Tensor, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]]
LARGEST, LEAST_NORMAL, LEVEL = 448.0, 2.0**-6, 2.0**-9  # of e4m3: finest levels are LEVEL apart
SUITED = [name for name, shape in SHAPES.items() if shape.geometry is None or shape.geometry.groups == 1]


def weight(shape: str) -> PackedWeight:
    found = weight_of(shape, "fp8")
    assert found is not None
    return found


@pytest.mark.parametrize("shape", SUITED)
def test_it_is_the_product_of_the_decoded_values(shape: str) -> None:
    w = weight(shape)
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        x, bias = input_of(shape, dtype), bias_of(shape, dtype)
        codes, scale = quantize_input(x, shared(x.ndim, w.shape, w.geometry))
        seen = codes.double() * scale.double()
        exact = multiply(seen, w.dequantize(torch.float32).double(), w.geometry, bias.double())
        found = fp8_product(x, w, bias)
        assert (found.dtype, found.shape) == (dtype, exact.shape)
        assert (found.double() - exact).norm() <= bound * exact.norm(), dtype


@pytest.mark.parametrize("shape", ["linear of many rows", "conv2d 3x3", "conv2d 1x1"])
def test_it_is_close_to_the_unrounded_product_but_not_equal(shape: str) -> None:
    x, w = input_of(shape), weight(shape)
    exact = multiply(x, w.dequantize(torch.float32), w.geometry)
    error = (fp8_product(x, w, None) - exact).norm() / exact.norm()
    assert 0.01 < error < 0.05  # independent rounding errors of at most 2^-4 per value


@pytest.mark.parametrize("dims", [(-1,), (1,), (1, 2, 3)], ids=str)
def test_codes_are_float8_the_largest_is_448_and_the_others_are_nearest(dims: tuple[int, ...]) -> None:
    x = torch.randn(3, 5, 6, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 7)
    codes, scale = quantize_input(x, dims)
    assert torch.equal(codes.to(torch.float8_e4m3fn).float(), codes)
    assert torch.equal(codes.abs().amax(dims), torch.full_like(codes.amax(dims), LARGEST))
    assert scale.shape == x.amax(dims, keepdim=True).shape
    wanted = (x.double() / scale.double()).abs()
    apart = torch.where(wanted < LEAST_NORMAL, LEVEL, 2.0 ** (wanted.log2().floor() - 3))
    assert ((codes.abs() - wanted).abs() <= apart / 2 * (1 + 1e-6)).all()


def test_ties_go_to_even() -> None:
    x = torch.tensor([[448.0, 17.0, 19.0, -21.0, LEVEL / 2, 3 * LEVEL / 2]])  # 16, 18, 20, ... are levels
    assert quantize_input(x, (-1,))[0].tolist() == [[448.0, 16.0, 20.0, -20.0, 0.0, 2 * LEVEL]]


def test_a_subnormal_scale_gives_no_code_above_the_largest() -> None:
    least = 2.0**-149
    x = torch.tensor([[600 * least, -600 * least, 100 * least]])  # 600 / 448 is rounded to 1
    codes, scale = quantize_input(x, (-1,))
    assert scale.item() == least
    assert codes.tolist() == [[LARGEST, -LARGEST, 96.0]]


def test_zeros_have_scale_one_and_non_finite_values_give_nan_in_place() -> None:
    x = torch.zeros(4, 64)
    x[1, 3], x[2, 3], x[3] = float("inf"), float("nan"), 1
    scale = quantize_input(x, (-1,))[1]
    assert scale[0] == 1
    y = fp8_product(x, weight_of("linear of no rows", "fp8") or pytest.fail("no such weight"), None)
    assert torch.isnan(y).all(1).tolist() == [False, True, True, False]
    assert torch.equal(y[0], torch.zeros(6))


def test_only_long_ungrouped_fp8_weights_use_float8_inputs() -> None:
    assert suits(weight("conv2d 3x3"))
    assert not suits(weight("conv2d in groups"))
    assert not suits(weight("conv2d of a channel each"))
    for format in ("int8", "int4", "nf4"):
        other = weight_of("conv2d 3x3", format)
        assert other is not None
        assert not suits(other)


def test_it_is_finer_than_int8_for_rows_with_an_outlier_and_coarser_otherwise() -> None:
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(1))

    def error(quantize: Quantize, x: torch.Tensor) -> float:
        codes, scale = quantize(x, (-1,))
        return float(((codes * scale - x)[:, 1:]).norm() / x[:, 1:].norm())

    assert error(quantize_input, x) > 2 * error(int8_compute.quantize_input, x)
    x[:, 0] = 300
    assert error(quantize_input, x) < error(int8_compute.quantize_input, x) / 2
