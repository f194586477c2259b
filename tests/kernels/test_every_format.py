"""What every format promises, on shapes that divide evenly and on shapes that do not.

A format that is registered is tested here without a line of its own, unless it quantizes in a way that `steps` below
does not know yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import pytest
import torch

from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.format import Format
from bitpolicy.kernels.formats import _REGISTERED, from_parameters

SHAPES = {
    "linear": (6, 128),
    "linear of one group and one weight": (4, 65),
    "linear that no group divides": (5, 101),
    "linear of an odd length below any group": (3, 7),
    "linear of one weight": (2, 1),
    "conv1d": (4, 6, 3),
    "conv2d": (8, 16, 3, 3),
    "conv2d of one tap": (8, 24, 1, 1),
    "conv2d that is not square": (3, 5, 2, 3),
    "conv2d in two groups": (8, 12, 3, 3),
    "depthwise conv2d": (8, 1, 3, 3),
    "conv3d": (4, 3, 2, 3, 3),
}
RELATIVE = {4: 0.15, 8: 0.01, 16: 2**-11}  # bound on |error| / |weight| of normal weights, by bits
WireReader = Callable[[str, Mapping[str, np.ndarray], tuple[int, ...]], np.ndarray]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]

every_format = pytest.mark.parametrize("format", _REGISTERED.values(), ids=lambda f: f.name)
every_packed_format = pytest.mark.parametrize(
    "format", [f for f in _REGISTERED.values() if f.packed], ids=lambda f: f.name
)
every_int4 = pytest.mark.parametrize(
    "format", [f for f in _REGISTERED.values() if f.name.startswith("int4")], ids=lambda f: f.name
)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Weights as models have them: normal, with rows of different size and a few outliers."""
    draw = torch.Generator().manual_seed(prod(shape))
    weight = torch.randn(shape, generator=draw) * torch.logspace(-3, 0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    weight.view(-1)[:: max(1, weight.numel() // 3)] *= 4
    return weight.to(dtype)


def restored(format: Format, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return format.dequantize(format.quantize(weight), weight.shape, dtype)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def steps(format: Format, tensors: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The distance between neighbouring levels, for each weight."""
    group = format.parameters().get("group")
    if group is None:
        return torch.zeros(shape)
    scale = tensors["weight_scale"].double()
    if group == "channel":
        return scale.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    out, channels, *kernel = shape
    rows = scale.repeat_interleave(group, 1)[:, : prod(shape[1:])]
    return rows.reshape(out, *kernel, channels).movedim(-1, 1)


def extreme(stored: dict[str, torch.Tensor], end: int) -> dict[str, torch.Tensor]:
    """The same scales with every code the lowest (0) or the highest (1) that there is."""
    codes = {torch.uint8: (0x00, 0xFF), torch.int8: (-127, 127)}[stored["weight_packed"].dtype]
    return {**stored, "weight_packed": torch.full_like(stored["weight_packed"], codes[end])}


@every_format
@every_shape
@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_stored_is_what_was_announced(format: Format, shape: tuple[int, ...], storage: torch.dtype) -> None:
    announced = format.tensors(shape, storage)
    stored = format.quantize(normal(shape, storage))
    assert list(stored) == list(announced)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in announced.items()
    }
    assert all(tensor.is_contiguous() for tensor in stored.values())


@every_format
@every_shape
def test_bytes_are_exact(format: Format, shape: tuple[int, ...]) -> None:
    stored = format.quantize(normal(shape))
    assert format.nbytes(shape, torch.float16) == sum(len(t.numpy().tobytes()) for t in stored.values())


@every_format
@every_shape
def test_each_weight_comes_back_within_half_a_step(format: Format, shape: tuple[int, ...]) -> None:
    weight = normal(shape)
    step = steps(format, format.quantize(weight), shape)
    # The scale is rounded to float16 before the codes are chosen, so 15 steps may miss the extremes by 15 / 2^11 step.
    rounding = 15 / 2**11 if format.parameters()["bits"] == 4 else 1e-5
    error = (restored(format, weight).double() - weight.double()).abs()
    assert (error <= step * (0.5 + rounding)).all()


@every_packed_format
@every_shape
def test_no_other_code_is_nearer_with_the_scale_that_is_stored(format: Format, shape: tuple[int, ...]) -> None:
    weight = normal(shape).double()
    stored = format.quantize(weight)
    back, step = format.dequantize(stored, shape, torch.float32).double(), steps(format, stored, shape)
    lowest, highest = (format.dequantize(extreme(stored, end), shape, torch.float32).double() for end in (0, 1))
    for neighbour in (back - step, back + step):
        inside = (neighbour >= lowest - step / 2) & (neighbour <= highest + step / 2)
        nearer = (neighbour - weight).abs() < (back - weight).abs() - 1e-4 * step
        assert not (inside & nearer).any()


@every_format
@every_shape
def test_the_weight_comes_back_close_as_a_whole(format: Format, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    worst = max(relative_error(back, row) for back, row in zip(restored(format, weight), weight, strict=True))
    assert worst <= RELATIVE[format.parameters()["bits"]]


@every_format
@every_shape
def test_zero_stays_zero(format: Format, shape: tuple[int, ...]) -> None:
    weight = normal(shape)
    weight.view(-1)[::3] = 0
    assert (restored(format, weight).view(-1)[::3] == 0).all()


@every_format
@every_shape
def test_a_second_reader_sees_the_same_weight(format: Format, shape: tuple[int, ...], read_wire: WireReader) -> None:
    stored = {name: tensor.numpy() for name, tensor in format.quantize(normal(shape)).items()}
    back = format.dequantize({name: torch.from_numpy(array) for name, array in stored.items()}, shape, torch.float32)
    np.testing.assert_array_equal(back.numpy(), read_wire(format.name, stored, shape))


@every_format
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_weight_is_computed_in_float32_and_rounded_once(format: Format, dtype: torch.dtype) -> None:
    weight = normal((8, 16, 3, 3))
    back = restored(format, weight, dtype)
    assert back.dtype == dtype
    assert back.is_contiguous()
    assert torch.equal(back, restored(format, weight, torch.float32).to(dtype))


@every_format
@every_shape
def test_the_weight_lies_in_memory_like_an_ordinary_one(format: Format, shape: tuple[int, ...]) -> None:
    """Also along dimensions of 1: odd strides there mean channels-last to torch, and the layers after it compute so."""
    assert restored(format, normal(shape)).stride() == torch.empty(shape).stride()


@every_packed_format
def test_the_dtype_and_the_strides_of_a_weight_do_not_matter(format: Format) -> None:
    weight = normal((8, 16, 3, 3))
    expected = format.quantize(weight)
    for same in (weight.float(), weight.double(), weight.to(memory_format=torch.channels_last), weight.clone()):
        stored = format.quantize(same)
        assert all(torch.equal(stored[name], expected[name]) and stored[name].is_contiguous() for name in expected)


@every_format
@every_shape
@pytest.mark.parametrize("value", [0.0, 0.37, -2.5, 1000.0], ids=str)
def test_a_constant_weight_comes_back(format: Format, shape: tuple[int, ...], value: float) -> None:
    weight = torch.full(shape, value, dtype=torch.float16)
    torch.testing.assert_close(restored(format, weight), weight.float(), rtol=2**-11, atol=0)


@every_packed_format
@every_shape
def test_a_group_of_zeros_has_scale_one(format: Format, shape: tuple[int, ...]) -> None:
    stored = format.quantize(torch.zeros(shape))
    assert (stored["weight_scale"] == 1).all()
    zero_points = stored.get("weight_zero", torch.zeros(1))
    assert (zero_points == 0).all()
    assert (stored["weight_packed"] == 0).all()


@every_format
@pytest.mark.parametrize("size", [1e-4, 1e-6, 3e-7, 1e-7, 6e-8, 1e-12, 1e-30], ids=str)
def test_weights_too_small_for_their_scale_are_off_by_no_more_than_its_rounding(format: Format, size: float) -> None:
    weight = normal((6, 130), torch.float32).clamp(-2, 2) * size
    step = steps(format, format.quantize(weight), (6, 130))
    step = torch.where(step == 1, 0.0, step)  # a scale that underflowed: every code is the zero point
    back = restored(format, weight)
    assert torch.isfinite(back).all()
    # float16 is spaced 2^-24 near zero, so a scale is off by 2^-25, and a range of 15 steps by 15 times that
    assert ((back.double() - weight.double()).abs() <= step * (0.5 + 15 / 2**11) + 15 * 2.0**-25).all()


@every_format
@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
def test_the_largest_float16_values_stay_finite_and_close(format: Format, storage: torch.dtype) -> None:
    weight = (normal((6, 130)).float().clamp(-1, 1) * 60000).to(storage)
    back = restored(format, weight)
    assert torch.isfinite(back).all()
    assert relative_error(back, weight) <= RELATIVE[format.parameters()["bits"]]


@every_int4
@pytest.mark.parametrize("weight", [[3e38, 1.0, -1e38], [1e7, 1.0, -1e6], [3e38] * 3], ids=str)
def test_values_beyond_the_range_of_a_scale_are_refused_or_kept(format: Format, weight: list[float]) -> None:
    given = torch.tensor([weight]).bfloat16()
    try:
        back = restored(format, given)
    except FormatError:
        return
    assert relative_error(back, given) <= RELATIVE[format.parameters()["bits"]]


@every_packed_format
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@every_shape
def test_a_weight_that_is_not_finite_is_refused_with_the_remedy(
    format: Format, shape: tuple[int, ...], value: float
) -> None:
    weight = normal(shape)
    weight.view(-1)[-1] = value
    with pytest.raises(FormatError, match="keep this layer at fp16"):
        format.quantize(weight)


@every_format
def test_a_format_is_a_value(format: Format) -> None:
    assert from_parameters(format.name, format.parameters()) == format
    assert hash(from_parameters(format.name, dict(format.parameters()))) == hash(format)
    with pytest.raises(AttributeError):
        format.name = "other"  # type: ignore[misc]
