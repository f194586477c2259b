"""What is Triton's own, checked in its interpreter: run by test_triton.py in a process where TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bitpolicy.kernels import triton_configs, triton_input, triton_layers
from bitpolicy.kernels.formats import format_named
from bitpolicy.kernels.int8_compute import int8_product, multiply, quantize_input, weight_codes
from bitpolicy.kernels.kernel import Geometry, PackedWeight
from bitpolicy.kernels.triton_configs import Config
from bitpolicy.kernels.triton_kernels import TritonDequantize, TritonFloat, TritonInt8
from bitpolicy.kernels.triton_weights import channel_scales, dequantized, requantized

FORMATS = ("int4", "int4-g32-sym", "int4-g128", "int4-channel", "int8-g64-asym")
SHAPES = ((20, 131), (9, 6, 3, 3), (5, 64, 1, 1), (4, 10, 2, 3, 3))
SQUARE = Geometry((1, 1), (1, 1), (1, 1))


def weight(format: str, shape: tuple[int, ...], geometry: Geometry | None = None) -> PackedWeight:
    draw = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=draw) * torch.logspace(-3, 0, shape[0]).view(-1, *[1] * (len(shape) - 1))
    found = format_named(format)
    return PackedWeight(found, shape, found.quantize(values), geometry)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[Config], None]:
    """Cuts every product so."""

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
    assert torch.equal(channel_scales(w.format, w.tensors, shape), scales)
    rows = requantized(w.format, w.tensors, shape, scales)
    assert torch.equal(rows, codes.movedim(1, -1).flatten(1))


def test_a_flat_weight_has_scale_one() -> None:
    format = format_named("int4")
    assert channel_scales(format, format.quantize(torch.zeros(3, 64)), (3, 64)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [7, 64, 1000, 20000])
def test_rows_are_quantized_as_defined(dtype: torch.dtype, length: int) -> None:
    x = inputs(3, 2, length, dtype=dtype) * torch.tensor([1e-4, 1, 30]).view(3, 1, 1).to(dtype)
    x[1, 1] = 0
    codes, scale = triton_input.quantized(x, per_sample=False)
    expected, s_x = quantize_input(x, per_sample=False)
    assert torch.equal(codes.view(x.shape).float(), expected)
    assert torch.equal(scale, s_x.flatten())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 70, 9, 13), (2, 3, 4, 5, 6), (1, 40, 33, 32)])
def test_samples_are_quantized_as_defined_and_written_channels_last(
    shape: tuple[int, ...], channels_last: bool
) -> None:
    x = inputs(*shape)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    codes, scale = triton_input.quantized(x, per_sample=True)
    expected, s_x = quantize_input(x, per_sample=True)
    assert codes.is_contiguous()
    assert torch.equal(codes.movedim(-1, 1).float(), expected)
    assert torch.equal(scale, s_x.flatten())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_or_sample_that_is_not_finite_has_no_scale(value: float) -> None:
    x = inputs(3, 4, 65)
    x[1, 2, 64] = value
    rows = triton_input.quantized(x, per_sample=False)[1].view(3, 4)
    assert torch.isnan(rows).nonzero().tolist() == [[1, 2]]
    samples = triton_input.quantized(x, per_sample=True)[1]
    assert torch.isnan(samples).tolist() == [False, True, False]


def test_layers_that_multiply_the_same_input_share_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = triton_input._quantized_rows
    monkeypatch.setattr(triton_input, "_quantized_rows", lambda x: calls.append(1) or plain(x))
    x, w = inputs(4, 64), weight("int8", (6, 64))
    for view in (x, x, x.view(4, 64)):
        assert torch.equal(TritonInt8()(view, w, None, {}), int8_product(x, w, None))
    assert len(calls) == 1
    x.mul_(2)  # a new value in the same place
    assert torch.equal(TritonInt8()(x, w, None, {}), int8_product(x, w, None))
    assert len(calls) == 2
    other = x.clone()
    del x
    assert torch.equal(TritonInt8()(other, w, None, {}), int8_product(other, w, None))
    assert len(calls) == 3
    with torch.inference_mode():  # such tensors do not count their writes
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


def test_codes_that_lie_channels_last_are_not_copied() -> None:
    w = weight("int8", (6, 32, 3, 3), SQUARE)
    assert set(TritonInt8().prepare(w, torch.float16)) == {"rows"}
    codes = w.tensors["weight_packed"].contiguous(memory_format=torch.channels_last)
    lies_well = replace(w, tensors={**w.tensors, "weight_packed": codes})
    assert TritonInt8().prepare(lies_well, torch.float16) == {}
    x = inputs(1, 32, 4, 4)
    assert torch.equal(TritonInt8()(x, lies_well, None, {}), int8_product(x, w, None))


@pytest.mark.parametrize("kernel", [TritonDequantize(), TritonFloat(), TritonInt8()], ids=lambda k: k.name)
def test_shapes_that_do_not_fit_are_errors(kernel: TritonInt8) -> None:
    w = weight("int8", (6, 32, 3, 3), SQUARE)
    with pytest.raises(RuntimeError, match="channels"):
        kernel(inputs(1, 31, 4, 4, dtype=torch.float16), w, None, {})
    with pytest.raises(RuntimeError):
        kernel(inputs(5, 31, dtype=torch.float16), weight("int8", (6, 32)), None, {})


def test_tuning_takes_the_fastest_way_and_remembers_it(monkeypatch: pytest.MonkeyPatch) -> None:
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
