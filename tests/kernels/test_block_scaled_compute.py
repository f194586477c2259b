"""The definitions of MXFP8 and NVFP4 activation quantization: against the formats of the same names, and by their
guarantees."""

from __future__ import annotations

import pytest
import torch
from toy_products import SHAPES, bias_of, input_of, weight_of

from bitpolicy.kernels.compute.block_scaled import FORMATS, block_scaled_product, rounded_input, suits
from bitpolicy.kernels.compute.int8 import multiply
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Compute, Geometry, PackedWeight

COMPUTES = tuple(FORMATS)
BLOCK = {Compute.MXFP8: 32, Compute.NVFP4: 16}
CONV = Geometry((1, 1), (1, 1), (1, 1))


def weight(shape: str, format: str) -> PackedWeight:
    found = weight_of(shape, format)
    assert found is not None
    return found


@pytest.mark.parametrize("compute", COMPUTES, ids=str)
def test_a_sample_is_rounded_like_a_weight_of_the_same_values(compute: Compute) -> None:
    """A sample's tokens, or a convolution's pixels, are the rows of that weight."""
    format = format_named(str(compute))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 7, 100, generator=draw) * torch.logspace(-2, 1, 7)[:, None]
    images = torch.randn(2, 64, 5, 3, generator=draw)
    for x, geometry in ((tokens, None), (images, CONV)):
        found = rounded_input(x, geometry, compute)
        for sample, seen in zip(x, found, strict=True):
            rows, back = (t if geometry is None else t.movedim(0, -1).flatten(0, 1) for t in (sample, seen))
            expected = format.dequantize(format.quantize(rows), rows.shape, torch.float32)
            torch.testing.assert_close(back, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("compute", COMPUTES, ids=str)
def test_it_is_the_product_of_the_rounded_input_and_the_stored_weight(compute: Compute) -> None:
    for shape in ("linear of many rows", "linear of odd sizes", "linear of one row", "conv2d 3x3", "conv3d 1x3x3"):
        for format in FORMATS[compute]:
            w = weight(shape, format.name)
            x, bias = input_of(shape), bias_of(shape)
            seen, dense = rounded_input(x, w.geometry, compute), w.dequantize(torch.float32)
            exact = multiply(seen.double(), dense.double(), w.geometry, bias.double())
            found = block_scaled_product(x, w, bias, compute)
            assert (found.double() - exact).norm() <= 1e-6 * exact.norm(), (shape, format.name)
            whole = multiply(x, dense, w.geometry, bias)
            share = (found - whole).norm() / (
                whole - bias.view(-1, *[1] * (whole.ndim - 2)) if w.geometry else whole
            ).norm()
            assert 0.005 < share < (0.05 if compute is Compute.MXFP8 else 0.15), (shape, format.name)


@pytest.mark.parametrize("compute", COMPUTES, ids=str)
def test_only_layers_in_its_formats_and_with_whole_blocks_of_channels_round_their_inputs(compute: Compute) -> None:
    for shape, held in SHAPES.items():
        channels, long = held.weight[1], torch.Size(held.weight[1:]).numel() >= 32
        even = held.geometry is None or (held.geometry.groups == 1 and channels % BLOCK[compute] == 0)
        for name in ("nvfp4", "mxfp4", "mxfp8", "fp8", "int4", "int8"):
            mine = name in [format.name for format in FORMATS[compute]]
            assert suits(weight(shape, name), compute) == (mine and even and long), (shape, name)


@pytest.mark.parametrize("compute", COMPUTES, ids=str)
def test_values_that_are_not_finite_stay_in_their_block_or_sample_and_zeros_stay_zero(compute: Compute) -> None:
    x = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(1))
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = x.clone()
        bad[1, 0, 5] = value
        wrong = torch.isnan(rounded_input(bad, None, compute))
        assert wrong[1, 0, : BLOCK[compute]].all()
        assert int(wrong.sum()) == (32 if compute is Compute.MXFP8 else 128)
    for size in (0.0, 1e-30, 1e30):
        found = rounded_input(x * size, None, compute)
        assert torch.isfinite(found).all()
        assert (found - x * size).norm() <= 0.15 * (x * size).norm()


def test_outliers_cost_block_scales_less_than_one_scale_for_each_row() -> None:
    from bitpolicy.kernels.compute import int8

    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 300

    def error(seen: torch.Tensor) -> float:
        return float(((seen - x)[:, 32:]).norm() / x[:, 32:].norm())

    steps, scale = int8.quantize_input(x, (-1,))
    assert error(rounded_input(x, None, Compute.MXFP8)) < 0.1 * error(steps * scale)
    assert error(rounded_input(x, None, Compute.NVFP4)) < 0.5 * error(steps * scale)
