"""INT8 products on the CPU equal their definition in plain torch bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bitpolicy.kernels.compute.int8 import (
    TOP,
    input_grid,
    int8_product,
    multiply,
    quantize_input,
    shared,
    weight_codes,
)
from bitpolicy.kernels.cpu import extension as cpu_extension
from bitpolicy.kernels.cpu import onednn as cpu_onednn
from bitpolicy.kernels.cpu.int8 import CpuInt8, laid_out
from bitpolicy.kernels.cpu.layout import channels_last_strides, contiguous_strides, in_channels_last
from bitpolicy.kernels.cpu.onednn import OneDnnInt8
from bitpolicy.kernels.formats.named import INT8, format_named
from bitpolicy.kernels.kernel import Geometry, Kernel, PackedWeight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def usable(kernel: Kernel) -> Kernel:
    """The kernel, or skip if this machine cannot run it. Not during collection, since it may have to be compiled."""
    weight = PackedWeight(INT8, (4, 64), INT8.quantize(torch.ones(4, 64)))
    if reason := kernel.refuses(torch.zeros(1, 64), weight):
        pytest.skip(reason)
    return kernel


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return usable(request.param)


@pytest.fixture
def cpu_int8() -> Kernel:
    return usable(CpuInt8())


@pytest.fixture
def onednn_int8() -> Kernel:
    return usable(OneDnnInt8())


both = pytest.mark.parametrize("kernel", [CpuInt8(), OneDnnInt8()], indirect=True, ids=lambda kernel: kernel.name)

# (weight, input, geometry): panels of 1 to 4 vectors, several panels, partial strips, every remainder of 4.
CALLS = {
    "linear": ((6, 128), (3, 128), None),
    "linear of odd sizes": ((70, 33), (2, 5, 33), None),
    "linear of two panels and a strip and a bit": ((152, 320), (51, 320), None),
    "linear of more weights than the cache holds": ((300, 2050), (97, 2050), None),
    "linear of no leading dimension": ((17, 34), (34,), None),
    "conv1d": ((5, 33, 3), (2, 33, 17), Geometry((1,), (1,), (1,))),
    "conv1d with stride": ((33, 36, 5), (1, 36, 40), Geometry((3,), (2,), (2,))),
    "conv2d 1x1": ((70, 40, 1, 1), (3, 40, 5, 7), Geometry((1, 1), (0, 0), (1, 1))),
    "conv2d 1x1 with stride": ((24, 40, 1, 1), (2, 40, 9, 7), Geometry((2, 2), (0, 0), (1, 1))),
    "conv2d 1x1 that is padded": ((24, 40, 1, 1), (2, 40, 4, 4), Geometry((1, 1), (1, 1), (1, 1))),
    "conv2d 3x3": ((70, 40, 3, 3), (2, 40, 9, 11), Geometry((1, 1), (1, 1), (1, 1))),
    "conv2d of few channels": ((130, 5, 3, 3), (1, 5, 16, 16), Geometry((1, 1), (1, 1), (1, 1))),
    "conv2d of one channel": ((9, 1, 7, 7), (2, 1, 20, 18), Geometry((1, 1), (3, 3), (1, 1))),
    "conv2d with all at once": ((19, 37, 3, 2), (2, 37, 12, 13), Geometry((2, 1), (1, 2), (1, 2))),
    "conv2d of one line": ((8, 64, 1, 3), (2, 64, 1, 50), Geometry((1, 1), (0, 1), (1, 1))),
    "conv3d": ((17, 5, 3, 2, 3), (2, 5, 5, 6, 7), Geometry((1, 2, 1), (1, 0, 1), (1, 1, 1))),
    "conv3d 1x3x3": ((8, 32, 1, 3, 3), (1, 32, 3, 5, 5), Geometry((1, 1, 1), (0, 1, 1), (1, 1, 1))),
}
every_call = pytest.mark.parametrize("call", CALLS)


def made(call: str, name: str = "int8", low_memory: bool = False) -> tuple[torch.Tensor, PackedWeight, torch.Tensor]:
    shape, size, geometry = CALLS[call]
    generator, format = torch.Generator().manual_seed(0), format_named(name)
    weight = torch.randn(shape, generator=generator) / 10
    x, bias = torch.randn(size, generator=generator) + 0.2, torch.randn(shape[0], generator=generator)
    return x, PackedWeight(format, shape, format.quantize(weight), geometry, low_memory), bias


def lying(x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield x
    if x.ndim in (4, 5):
        yield x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    yield torch.stack([x, x + 1], -1)[..., 0]


def product(kernel: Kernel, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return kernel(x, weight, bias, kernel.prepare(weight, x.dtype))


def assert_defined(
    kernel: Kernel, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, about: str = ""
) -> None:
    assert kernel.refuses(x, weight) is None, about
    found, right = product(kernel, x, weight, bias), int8_product(x, weight, bias)
    assert (found.shape, found.dtype) == (right.shape, right.dtype), about
    torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{about}: {text}")


@both
@every_call
def test_it_equals_the_definition_bit_for_bit(kernel: Kernel, call: str) -> None:
    x, weight, bias = made(call)
    for dtype in DTYPES:
        for each in lying(x.to(dtype)):
            assert_defined(kernel, each, weight, bias.to(dtype))
            assert_defined(kernel, each, weight, None)


@both
def test_any_batch_size_works(kernel: Kernel) -> None:
    for call in CALLS:
        x, weight, bias = made(call)
        for samples in (0, 1, 3) if x.ndim > 1 else ():
            many = x[:1].expand(samples, *x.shape[1:]) * torch.arange(1, samples + 1).view(-1, *[1] * (x.ndim - 1))
            assert_defined(kernel, many, weight, bias, f"{call}, {samples}")


@both
@pytest.mark.parametrize("format", ["int4", "int3-g32-asym", "int4-g32-rot", "nf4", "fp8", "int8-g64-asym"])
def test_other_formats_are_requantized_as_the_definition_does(kernel: Kernel, format: str) -> None:
    for call in ("linear of two panels and a strip and a bit", "conv2d with all at once", "conv2d 1x1"):
        x, weight, bias = made(call, format if CALLS[call][0][1] % 32 == 0 or "rot" not in format else "int4")
        assert_defined(kernel, x, weight, bias)
        assert_defined(kernel, x, made(call, weight.format.name, low_memory=True)[1], bias)


@both
@pytest.mark.parametrize("call", ["linear", "conv2d 3x3", "conv2d 1x1"])
def test_the_result_has_torchs_memory_format(kernel: Kernel, call: str) -> None:
    x, weight, bias = made(call)
    for each in lying(x):
        right = multiply(each, weight.dequantize(torch.float32), weight.geometry, bias)
        assert product(kernel, each, weight, bias).stride() == right.stride()


@both
@pytest.mark.parametrize(
    ("call", "where"),
    [
        ("linear of odd sizes", (1, 0)),
        ("conv2d 3x3", (1,)),
        ("conv1d", (1,)),
        ("conv2d 1x1", (1, slice(None), 0, 0)),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_make_their_row_or_sample_nan(
    kernel: Kernel, call: str, where: tuple[Any, ...], value: float
) -> None:
    x, weight, bias = made(call)
    for each in lying(x):
        each = each.clone(memory_format=torch.preserve_format)
        each[(1, *[0] * (x.ndim - 1))] = value
        y, right = product(kernel, each, weight, bias), int8_product(each, weight, bias)
        assert torch.isnan(y[where]).all()
        assert torch.equal(torch.isnan(y), torch.isnan(right))
        assert torch.equal(y[0], right[0])


@both
@pytest.mark.parametrize("size", [1e-45, 2.66e-43, 1e-42, 1e-38, 1e-30, 1e-5, 1e20, 3e38])
def test_huge_and_tiny_values(kernel: Kernel, size: float) -> None:
    """Includes subnormal values, whose scale can be far from (max - min) / 255, so that codes are clamped, or zero."""
    for call in ("linear of odd sizes", "conv2d 3x3", "conv2d 1x1"):
        x, weight, _ = made(call)
        x = (x / x.abs().max()) * size
        for each in (x, x.abs(), -x.abs()):
            assert_defined(kernel, each, weight, None)


@both
def test_ties_go_to_even(kernel: Kernel) -> None:
    """Halves, and the floats just below and above; the last values make the scale one, and z odd or even."""
    for most in (255.0, 128.0, 127.0, 0.0):
        halves = torch.arange(most - 254.5, most, 1)
        near = torch.cat([halves, halves.nextafter(torch.tensor(300.0)), halves.nextafter(torch.tensor(-300.0))])
        x = torch.cat([near, torch.tensor([most, most - 255])])
        identity = torch.eye(len(x)).mul(127).to(torch.int8)
        weight = PackedWeight(INT8, identity.shape, {"weight_packed": identity, "weight_scale": torch.ones(len(x))})
        for scale in (1.0, 0.37, 3e-5, 7e8):
            row = (x * scale)[None]
            steps, s_x = quantize_input(row, (-1,))
            assert torch.equal(product(kernel, row, weight, None), 127 * steps * s_x)
            assert scale != 1 or torch.equal(steps[0], x.round())


SIGNS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "positive": lambda x: x.abs() + 1,
    "negative": lambda x: -x.abs() - 1,
    "zero": lambda x: 0 * x,
    "silu": lambda x: torch.nn.functional.silu(4 * x),
}


@both
@pytest.mark.parametrize("kind", SIGNS)
def test_zero_points_suit_inputs_of_one_sign_and_of_both(kernel: Kernel, kind: str) -> None:
    for call in CALLS:
        x, weight, bias = made(call)
        x = SIGNS[kind](x)
        zero = input_grid(x, shared(x.ndim, weight.shape, weight.geometry))[1]
        assert {"positive": zero.max() == 0, "negative": zero.min() == TOP, "zero": zero.max() == 0,
                "silu": bool((zero < TOP / 2).all())}[kind]  # fmt: skip
        for each in lying(x):
            assert_defined(kernel, each, weight, bias, call)


@both
@pytest.mark.parametrize("spatial", [(37,), (5, 7), (17, 31), (2, 3, 7)], ids=str)
def test_a_one_tap_convolution_is_a_linear_layer_over_pixels(kernel: Kernel, spatial: tuple[int, ...]) -> None:
    """So each pixel has its own scale, in any memory format."""
    generator, n = torch.Generator().manual_seed(0), len(spatial)
    x = torch.randn((2, 37, *spatial), generator=generator) * torch.rand((2, 1, *spatial), generator=generator) ** 4
    bias, stored = torch.randn(70, generator=generator), INT8.quantize(torch.randn(70, 37, generator=generator))
    linear = PackedWeight(INT8, (70, 37), stored)
    tap = {**stored, "weight_packed": stored["weight_packed"].view(70, 37, *[1] * n)}
    conv = PackedWeight(INT8, (70, 37, *[1] * n), tap, Geometry((1,) * n, (0,) * n, (1,) * n))
    for each in lying(x):
        right = product(kernel, each.movedim(1, -1).contiguous(), linear, bias)
        assert torch.equal(product(kernel, each, conv, bias).movedim(1, -1), right)


@both
@pytest.mark.parametrize("most", [0.0, 0.3, 40.0])
def test_padding_is_zero_whatever_its_code(kernel: Kernel, most: float) -> None:
    """As if the input came with the zeros around it, which change no range."""
    x, weight, bias = made("conv2d with all at once")
    x = x.clamp(max=most) * torch.tensor([1.0, -3.0]).view(2, 1, 1, 1)
    assert not (input_grid(x, (1, 2, 3))[1] == 128).any()
    around = torch.nn.functional.pad(x, (2, 2, 1, 1))
    bare = PackedWeight(INT8, weight.shape, weight.tensors, Geometry((2, 1), (0, 0), (1, 2)))
    assert torch.equal(product(kernel, x, weight, bias), product(kernel, around, bare, bias))


@both
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_do_not_overflow(kernel: Kernel, sign: int) -> None:
    """Also with a zero point of 255, whose two sums are as large."""
    length = 2**16 - 4
    weight = PackedWeight(
        INT8,
        (2, length),
        {"weight_packed": torch.tensor([[127], [-127]], dtype=torch.int8).expand(2, length).contiguous(),
         "weight_scale": torch.ones(2)},
    )  # fmt: skip
    found = product(kernel, torch.full((1, length), sign * 255.0), weight, None)
    torch.testing.assert_close(found.double(), sign * torch.tensor([[1.0, -1.0]]).double() * 255 * 127 * length)


@both
def test_calls_it_cannot_serve_are_refused(kernel: Kernel) -> None:
    x, weight, _ = made("conv2d 3x3")
    grouped = PackedWeight(INT8, (40, 20, 3, 3), weight.tensors, Geometry((1, 1), (1, 1), (1, 1), groups=2))
    assert "grouped" in str(kernel.refuses(x, grouped))
    assert "float64" in str(kernel.refuses(x.double(), weight))
    assert str(2**16) in str(kernel.refuses(x, PackedWeight(INT8, (1, 2**16), {})))
    assert "CPU" in str(kernel.refuses(x.to("meta"), weight))


def test_threads_change_nothing(cpu_int8: Kernel) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for call in CALLS:
            x, weight, bias = made(call)
            for each in lying(x):
                assert_defined(cpu_int8, each, weight, bias)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("cpu_int8")
def test_a_layout_takes_one_byte_per_weight() -> None:
    """Plus padding for at most sixteen channels and four inputs."""
    _, weight, _ = made("linear of two panels and a strip and a bit")
    layout = laid_out(weight)
    assert layout["codes"].numel() == 160 * 320
    codes, scale = weight_codes(weight)
    assert torch.equal(layout["offsets"][:152], codes.sum(1, dtype=torch.int32))
    assert torch.equal(layout["scale"][:152], scale)
    assert not layout["scale"][152:].any()


def test_both_kernels_report_missing_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = made("linear")
    monkeypatch.setattr(cpu_extension, "why_unavailable", lambda: None)
    monkeypatch.setattr(cpu_extension, "has_int8", lambda: False)
    assert "this machine has no AVX-512 VNNI" in str(CpuInt8().refuses(x, weight))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    cpu_onednn._unusable.cache_clear()
    try:
        assert "this machine has no AVX-512 VNNI" in str(OneDnnInt8().refuses(x, weight))
    finally:
        cpu_onednn._unusable.cache_clear()


@pytest.mark.usefixtures("onednn_int8")
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda *_: (_ for _ in ()).throw(RuntimeError("expected 13 arguments")), "expected 13 arguments"),
        (lambda steps, zero, layout, geometry, out: torch.zeros(2, out), "wrong sums"),
    ],
)
def test_changed_private_operators_are_not_used(
    monkeypatch: pytest.MonkeyPatch, change: object, complaint: str
) -> None:
    x, weight, _ = made("linear")
    monkeypatch.setattr(cpu_onednn, "_sums", change)
    cpu_onednn._unusable.cache_clear()
    try:
        assert complaint in str(OneDnnInt8().refuses(x, weight))
    finally:
        cpu_onednn._unusable.cache_clear()


def test_strides_equal_torchs() -> None:
    for shape in ((2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (2, 3, 1, 5), (0, 3, 4, 5), (2, 3, 4, 5, 6)):
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        plain, moved = torch.empty(shape), torch.empty(shape, memory_format=last)
        assert contiguous_strides(shape) == plain.stride()
        assert channels_last_strides(shape) == moved.stride()
        for x in (plain, moved, plain.transpose(-1, -2), moved[..., ::2]):
            suggested = torch._prims_common.suggest_memory_format(x) == last
            assert 0 in shape or in_channels_last(tuple(x.shape), x.stride()) == suggested, (shape, x.stride())
