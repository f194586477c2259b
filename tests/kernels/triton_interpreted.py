"""Tests specific to Triton, run in its interpreter by test_triton_interpreted.py, with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from toy_inputs import SIGNS, inputs

from bitpolicy.kernels.compute.fp8 import fp8_product
from bitpolicy.kernels.compute.int8 import int8_product, multiply, weight_codes
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Geometry, Kernel, PackedWeight
from bitpolicy.kernels.triton import configs as triton_configs
from bitpolicy.kernels.triton import input as triton_input
from bitpolicy.kernels.triton import layers as triton_layers
from bitpolicy.kernels.triton.configs import Config
from bitpolicy.kernels.triton.kernels import TritonDequantize, TritonFloat, TritonFp8, TritonInt8
from bitpolicy.kernels.triton.weights import channel_scales, dequantized, requantized

FORMATS = ("int4", "int4-g32-sym", "int4-g128", "int4-channel", "int8-g64-asym")
SHAPES = ((20, 131), (9, 6, 3, 3), (5, 64, 1, 1), (4, 10, 2, 3, 3))
SQUARE = Geometry((1, 1), (1, 1), (1, 1))
ONE_TAP = Geometry((1, 1), (0, 0), (1, 1))


def weight(format: str, shape: tuple[int, ...], geometry: Geometry | None = None) -> PackedWeight:
    draw = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=draw) * torch.logspace(-3, 0, shape[0]).view(-1, *[1] * (len(shape) - 1))
    found = format_named(format)
    return PackedWeight(found, shape, found.quantize(values), geometry)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[Config], None]:
    """Force the configuration of every product."""

    def so(config: Config) -> None:
        monkeypatch.setattr(triton_layers, "choose", lambda *_: config)

    return so


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", [*FORMATS, "int8", "int8-g32-sym"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_dequantized_weight_has_the_bits_of_its_format(
    format: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    w = weight(format, shape)
    expected = w.dequantize(dtype)
    plain = dequantized(w.format, w.tensors, shape, dtype)
    assert torch.equal(plain, expected)
    assert plain.is_contiguous()
    last = dequantized(w.format, w.tensors, shape, dtype, channels_last=True)
    assert torch.equal(last, expected)
    assert last.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_requantized_weight_has_the_codes_of_the_definition(format: str, shape: tuple[int, ...]) -> None:
    w = weight(format, shape)
    codes, scales = weight_codes(w)
    found, sums = channel_scales(w.format, w.tensors, shape)
    assert torch.equal(found, scales)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), codes.long().flatten(1).sum(1))
    rows = requantized(w.format, w.tensors, shape, scales)
    assert torch.equal(rows, codes.movedim(1, -1).flatten(1))


def test_a_flat_weight_has_scale_one() -> None:
    format = format_named("int4")
    scales, sums = channel_scales(format, format.quantize(torch.zeros(3, 64)), (3, 64))
    assert scales.tolist() == [1, 1, 1]
    assert sums.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("sign", "format"),
    [
        *product(["both signs", "SiLU"], ["int4", "int4-g128", "int8", "fp8"]),
        *product(["above zero", "below zero"], ["int8"]),
    ],
)
@pytest.mark.parametrize(
    ("shape", "slides"),
    [
        ((9, 70), None),
        ((9, 40, 3, 3), SQUARE),
        ((9, 32, 3, 3), Geometry((2, 1), (2, 1), (1, 2))),
        ((9, 64, 1, 1), ONE_TAP),
        ((9, 40, 1, 1), ONE_TAP),
        ((9, 40, 1, 1), Geometry((2, 1), (0, 0), (1, 1))),
        ((9, 40, 1, 1), SQUARE),
    ],
    ids=str,
)
def test_products_equal_the_definition_for_any_zero_point(
    shape: tuple[int, ...], slides: Geometry | None, format: str, sign: str
) -> None:
    w, bias = weight(format, shape, slides), inputs(shape[0])
    x = SIGNS[sign](inputs(3, shape[1]) if slides is None else inputs(2, shape[1], 5, 6))
    x[0] *= 100
    right = int8_product(x, w, bias)
    for arranged in (x, x if slides is None else x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(TritonInt8()(arranged, w, bias, TritonInt8().prepare(w, x.dtype)), right)
    if format != "fp8":
        assert torch.equal(TritonInt8()(x, w, bias, {}), right)  # as with low_memory


@pytest.mark.parametrize(
    ("shape", "slides"),
    [
        ((9, 70), None),
        ((9, 40, 3, 3), SQUARE),
        ((9, 32, 3, 3), Geometry((2, 1), (2, 1), (1, 2))),
        ((9, 64, 1, 1), ONE_TAP),
        ((9, 40, 1, 1), SQUARE),
    ],
    ids=str,
)
@pytest.mark.parametrize("splits", [1, 3])
def test_float8_products_equal_the_definition(
    cut: Callable[[Config], None], shape: tuple[int, ...], slides: Geometry | None, splits: int
) -> None:
    cut(Config(16, 16, 32, 1, 1, splits))
    w, bias = weight("fp8", shape, slides), inputs(shape[0])
    x = inputs(3, shape[1]) if slides is None else inputs(2, shape[1], 3, 4)
    x[0] *= 100
    right = fp8_product(x, w, bias)
    bound = 1e-6 * multiply(x.abs(), w.dequantize(torch.float32).abs(), slides, bias.abs())
    for arranged in (x, x if slides is None else x.contiguous(memory_format=torch.channels_last)):
        for prepared in (TritonFp8().prepare(w, x.dtype), {}):  # {} as with low_memory
            assert ((TritonFp8()(arranged, w, bias, prepared) - right).abs() <= bound).all()


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("slides", [SQUARE, ONE_TAP], ids=["a sample", "a pixel"])
@pytest.mark.parametrize("channels", [40, 64])
def test_every_split_uses_the_scales_of_its_samples_and_pixels(
    cut: Callable[[Config], None], slides: Geometry, splits: int, channels: int
) -> None:
    cut(Config(16, 16, 32, 1, 1, splits))
    taps = (1, 1) if slides == ONE_TAP else (3, 3)
    w, bias = weight("int8", (20, channels, *taps), slides), inputs(20)
    x = torch.nn.functional.silu(inputs(3, channels, 2, 3)) * torch.tensor([1, 7, 100]).view(3, 1, 1, 1)
    assert torch.equal(TritonInt8()(x, w, bias, {}), int8_product(x, w, bias))


def test_layers_share_the_codes_of_an_input_only_if_they_share_scales_and_padding() -> None:
    x = inputs(2, 32, 5, 5)
    for taps, slides in ((3, SQUARE), (1, ONE_TAP), (3, ONE_TAP), (1, SQUARE), (3, SQUARE)):
        w = weight("int8", (6, 32, taps, taps), slides)
        assert torch.equal(TritonInt8()(x, w, None, {}), int8_product(x, w, None))
    as_rows = weight("int8", (6, 5))
    assert torch.equal(TritonInt8()(x, as_rows, None, {}), int8_product(x, as_rows, None))


def test_the_longest_sum_fits_32_bits(cut: Callable[[Config], None]) -> None:
    cut(Config(16, 16, 1024, 1, 1))
    from bitpolicy.kernels.triton.kernels import _LONGEST

    assert _LONGEST * 255 * 127 < 2**31 <= (_LONGEST + 1) * 255 * 127
    x = torch.ones(2, _LONGEST)
    x[1, 0] = -1e-6  # so that z is 0, and x_q 255
    w = PackedWeight(format_named("int8"), (2, _LONGEST), format_named("int8").quantize(torch.ones(2, _LONGEST)))
    w.tensors["weight_packed"][1] *= -1
    assert TritonInt8().refuses(x, w) is None
    assert torch.equal(TritonInt8()(x, w, None, {}), int8_product(x, w, None))
    longer = replace(w, shape=(2, _LONGEST + 1))
    assert "32 bits" in str(TritonInt8().refuses(x, longer))


@pytest.mark.parametrize(("kernel", "format"), [(TritonInt8(), "int8"), (TritonFp8(), "fp8")])
def test_an_input_too_large_with_its_padding_is_refused(kernel: Kernel, format: str) -> None:
    sides = {}
    for side in (4000, 4100):
        w = weight(format, (6, 32, 3, 3), Geometry((1, 1), (side, side), (1, 1)))
        sides[side] = kernel.refuses(inputs(1, 32, 4, 4), w)
    assert sides == {4000: None, 4100: "for padded inputs of less than 2^31 values"}


def test_layers_that_multiply_the_same_input_share_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = triton_input._quantized_rows
    monkeypatch.setattr(triton_input, "_quantized_rows", lambda *args: calls.append(1) or plain(*args))
    x, w = inputs(4, 64), weight("int8", (6, 64))
    for view in (x, x, x.view(4, 64)):
        assert torch.equal(TritonInt8()(view, w, None, {}), int8_product(x, w, None))
    assert len(calls) == 1
    x.mul_(2)  # new values in the same memory
    assert torch.equal(TritonInt8()(x, w, None, {}), int8_product(x, w, None))
    assert len(calls) == 2
    other = x.clone()
    del x
    assert torch.equal(TritonInt8()(other, w, None, {}), int8_product(other, w, None))
    assert len(calls) == 3
    with torch.inference_mode():  # torch does not count writes to such tensors
        uncounted = other * 1
        for _ in range(2):
            TritonInt8()(uncounted, w, None, {})
            uncounted.add_(1)
    assert len(calls) == 5


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_a_split_sum_is_the_whole_sum(cut: Callable[[Config], None], format: str, splits: int) -> None:
    cut(Config(32, 16, 32, 1, 1, splits))
    w, x, bias = weight(format, (40, 200)), inputs(5, 200, dtype=torch.float16), inputs(40, dtype=torch.float16)
    assert torch.equal(TritonInt8()(x, w, bias, {}), int8_product(x, w, bias))
    found = TritonFloat()(x, w, bias, {})
    exact = multiply(x.double(), w.dequantize(torch.float32).double(), None, bias.double())
    assert (found.double() - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("bk", [32, 64, 128])
@pytest.mark.parametrize("format", ["int4-g32-sym", "int4-g128", "int4-channel", "int8"])
def test_steps_may_be_shorter_or_longer_than_groups_and_taps(
    cut: Callable[[Config], None], format: str, bk: int
) -> None:
    cut(Config(16, 32, bk, 1, 1))
    slides = Geometry((1, 2), (0, 1), (1, 1))
    for channels in (40, 64):
        w = weight(format, (9, channels, 1, 3), slides)
        x = inputs(2, channels, 2, 5, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
        found = TritonFloat()(x, w, None, {})
        exact = multiply(x.double(), w.dequantize(torch.float32).double(), slides)
        assert (found.double() - exact).norm() < 1e-3 * exact.norm()
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(TritonInt8()(x, w, None, {}), int8_product(x, w, None))


def test_4_bits_are_requantized_inside_the_product_for_few_rows_and_before_it_for_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w, x, calls = weight("int4-g32-sym", (20, 96)), inputs(130, 96), []
    plain = triton_layers.requantized
    monkeypatch.setattr(triton_layers, "requantized", lambda *args: calls.append(1) or plain(*args))
    assert torch.equal(TritonInt8()(x, w, None, {}), int8_product(x, w, None))
    assert calls == [1]
    assert torch.equal(TritonInt8()(x[:100], w, None, {}), int8_product(x[:100], w, None))
    assert calls == [1]


def test_channels_last_codes_are_not_copied() -> None:
    w = weight("int8", (6, 32, 3, 3), SQUARE)
    assert set(TritonInt8().prepare(w, torch.float16)) == {"rows", "code_sums"}
    codes = w.tensors["weight_packed"].contiguous(memory_format=torch.channels_last)
    lies_well = replace(w, tensors={**w.tensors, "weight_packed": codes})
    assert set(TritonInt8().prepare(lies_well, torch.float16)) == {"code_sums"}
    x = inputs(1, 32, 4, 4)
    assert torch.equal(TritonInt8()(x, lies_well, None, {}), int8_product(x, w, None))


@pytest.mark.parametrize("kernel", [TritonDequantize(), TritonFloat(), TritonInt8(), TritonFp8()], ids=lambda k: k.name)
def test_mismatched_shapes_are_errors(kernel: Kernel) -> None:
    format = "fp8" if kernel.name == "triton-fp8" else "int8"
    w = weight(format, (6, 32, 3, 3), SQUARE)
    with pytest.raises(RuntimeError, match="channels"):
        kernel(inputs(1, 31, 4, 4, dtype=torch.float16), w, None, {})
    with pytest.raises(RuntimeError):
        kernel(inputs(5, 31, dtype=torch.float16), weight(format, (6, 32)), None, {})


def test_tuning_keeps_the_fastest_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_configs, "_tuned", {})
    product = triton_configs.Product(4096, 640, 640, 640, 8, True)
    ways = triton_configs.configs(product)
    assert len(ways) > 1
    asked: list[Config] = []

    def time(config: Config) -> float:
        asked.append(config)
        return 1.0 if config == ways[-1] else 2.0

    assert triton_configs.choose(product, None, time) == ways[0]
    assert asked == []
    monkeypatch.setattr(triton_configs, "_tuning", True)
    assert triton_configs.choose(product, None, None) == ways[0]
    for _ in range(2):
        assert triton_configs.choose(product, None, time) == ways[-1]
    assert asked == ways
