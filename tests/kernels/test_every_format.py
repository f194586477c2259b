"""What every format promises, on shapes that divide evenly and on shapes that do not.

Bounds follow from the levels that the specification gives a format, worked out here for each kind. Rotated formats keep
their promises in the rotated domain, which is taken here with an explicit matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import pytest
import scipy.linalg
import torch
from toy_formats import KINDS, NF4_LEVELS, PACKED

from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import format_named, from_parameters

SHAPES = {
    "linear": (6, 128),
    "linear of one group and one weight": (4, 65),
    "linear that no group divides": (5, 101),
    "linear of an odd length below any group": (3, 7),
    "linear of one weight": (2, 1),
    "conv1d": (4, 6, 3),
    "conv2d": (8, 16, 3, 3),
    "conv2d of one tap": (8, 24, 1, 1),
    "conv2d that every group divides": (3, 128, 1, 3),
    "conv2d that is not square": (3, 5, 2, 3),
    "conv2d in two groups": (8, 12, 3, 3),
    "depthwise conv2d": (8, 1, 3, 3),
    "conv3d": (4, 3, 2, 3, 3),
}
RELATIVE = {2: 0.75, 3: 0.35, 4: 0.16, 5: 0.08, 6: 0.04, 7: 0.02, 8: 0.01, 16: 2**-11}
"""Bound on |error| / |weight| of the rows of a normal weight, by bits."""
OF_FLOAT8 = 0.035
WireReader = Callable[[str, Mapping[str, np.ndarray], tuple[int, ...]], np.ndarray]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ROTATED = [format for format in PACKED if "rotation" in format.parameters()]

every_format = pytest.mark.parametrize("format", KINDS, ids=lambda f: f.name)
every_packed_format = pytest.mark.parametrize("format", PACKED, ids=lambda f: f.name)


def on_shapes(formats: tuple[Format, ...] | list[Format]) -> pytest.MarkDecorator:
    """Every format on every shape that it fits."""
    return pytest.mark.parametrize(
        ("format", "shape"),
        [
            pytest.param(format, shape, id=f"{format.name}-{about}")
            for format in formats
            for about, shape in SHAPES.items()
            if format.fits(shape)
        ],
    )


every_format_and_shape = on_shapes(KINDS)
every_packed_format_and_shape = on_shapes(PACKED)


def large_enough(format: Format) -> tuple[int, ...]:
    """A shape that the format fits and whose last group is short where it may be."""
    return (6, 128) if format in ROTATED else (6, 130)


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


def relative_bound(format: Format) -> float:
    return OF_FLOAT8 if format.name == "fp8" else RELATIVE[format.parameters()["bits"]]


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """For numpy, which has no float8."""
    return (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor).numpy()


def rows_of(format: Format, weight: torch.Tensor) -> torch.Tensor:
    """The weight as rows, channels fastest, where the format rounds it: rotated if it rotates; float64."""
    rows = weight.double().movedim(1, -1).flatten(1)
    if "rotation" not in format.parameters():
        return rows
    size = format.parameters()["group"]
    rotation = torch.from_numpy(scipy.linalg.hadamard(size)).double() / size**0.5
    return (rows.unflatten(1, (-1, size)) @ rotation).flatten(1)


def along_rows(format: Format, part: torch.Tensor, length: int) -> torch.Tensor:
    """Scales or zero points, one for each weight of a row; float64, shape (out, length)."""
    group = format.parameters()["group"]
    run = length if group == "channel" else group
    return part.double().reshape(len(part), -1).repeat_interleave(run, 1)[:, :length]


def levels(format: Format, stored: Mapping[str, torch.Tensor], length: int) -> torch.Tensor:
    """What each weight may become with the scales that are stored; float64, shape (out, length, levels)."""
    scale = along_rows(format, stored["weight_scale"], length)[..., None]
    parameters = format.parameters()
    if format.name == "int8":
        return torch.arange(-127, 128) * scale
    if format.name == "fp8":
        values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
        return values[values.isfinite()] * scale
    if format.name == "nf4":
        return torch.tensor(NF4_LEVELS).double() * scale
    codes = torch.arange(2 ** parameters["bits"])
    middle = 2 ** (parameters["bits"] - 1)
    zero = middle if parameters["symmetric"] else along_rows(format, stored["weight_zero"], length)[..., None]
    return (codes - zero) * scale


def bounds(format: Format, stored: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """How far from each weight its level may be; float64, shape (out, K).

    Half a step, where the grid reaches. It falls short of the extremes by the rounding of its float16 scale, once for
    every step to there; a symmetric one ends a step short on the side that is not its extreme's.
    """
    scale = along_rows(format, stored["weight_scale"], rows.shape[1])
    step, bits = scale.abs(), format.parameters()["bits"]
    if format.name == "int8":
        return step * 0.50001
    if format.name == "fp8":
        return torch.maximum(rows.abs() / 16, step * 2.0**-10) * 1.00001
    half_step = 2.0**-11 * step + 2.0**-25  # off by no more than this is a float16
    if format.name == "nf4":
        return step * (1 - 0.6961928) / 2 + half_step
    if not format.parameters()["symmetric"]:
        return step / 2 + (2**bits - 1) * half_step
    opposite = rows.sign() == scale.sign()
    return step * torch.where(opposite, 1.0, 0.5) + 2 ** (bits - 1) * half_step


@every_format_and_shape
@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_stored_is_what_was_announced(format: Format, shape: tuple[int, ...], storage: torch.dtype) -> None:
    announced = format.tensors(shape, storage)
    stored = format.quantize(normal(shape, storage))
    assert list(stored) == list(announced)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in announced.items()
    }
    assert all(tensor.is_contiguous() for tensor in stored.values())


@every_format_and_shape
def test_bytes_are_exact(format: Format, shape: tuple[int, ...]) -> None:
    stored = format.quantize(normal(shape))
    assert format.nbytes(shape, torch.float16) == sum(len(as_bytes(t).tobytes()) for t in stored.values())


@every_packed_format_and_shape
def test_each_weight_comes_back_within_half_a_step(format: Format, shape: tuple[int, ...]) -> None:
    weight = normal(shape)
    stored = format.quantize(weight)
    rows, back = (rows_of(format, w) for w in (weight, format.dequantize(stored, shape, torch.float32)))
    float32 = 1e-6 * rows.abs().amax(1, keepdim=True)  # of a rotation and back
    assert ((back - rows).abs() <= bounds(format, stored, rows) + float32).all()


@every_packed_format_and_shape
def test_no_other_code_is_nearer_with_the_scale_that_is_stored(format: Format, shape: tuple[int, ...]) -> None:
    weight = normal(shape)
    stored = format.quantize(weight)
    rows, back = (rows_of(format, w) for w in (weight, format.dequantize(stored, shape, torch.float32)))
    away = (levels(format, stored, rows.shape[1]) - rows[..., None]).abs().amin(-1)
    float32 = 1e-6 * rows.abs().amax(1, keepdim=True)
    assert ((back - rows).abs() <= away * (1 + 1e-4) + float32).all()


@every_packed_format_and_shape
def test_every_weight_comes_back_on_a_level(format: Format, shape: tuple[int, ...]) -> None:
    weight = normal(shape)
    stored = format.quantize(weight)
    back = rows_of(format, format.dequantize(stored, shape, torch.float32))
    off = (levels(format, stored, back.shape[1]) - back[..., None]).abs().amin(-1)
    assert (off <= 1e-6 * back.abs().amax(1, keepdim=True)).all()


@every_format_and_shape
def test_the_weight_comes_back_close_as_a_whole(format: Format, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    worst = max(relative_error(back, row) for back, row in zip(restored(format, weight), weight, strict=True))
    assert worst <= relative_bound(format)


@on_shapes([format for format in KINDS if format not in ROTATED])
def test_zero_stays_zero(format: Format, shape: tuple[int, ...]) -> None:
    weight = normal(shape)
    weight.view(-1)[::3] = 0
    assert (restored(format, weight).view(-1)[::3] == 0).all()


@every_format_and_shape
def test_a_second_reader_sees_the_same_weight(format: Format, shape: tuple[int, ...], read_wire: WireReader) -> None:
    stored = format.quantize(normal(shape))
    back = format.dequantize(stored, shape, torch.float32).numpy()
    read = read_wire(format.name, {name: as_bytes(tensor) for name, tensor in stored.items()}, shape)
    if format in ROTATED:  # float32 butterflies against a float64 product
        np.testing.assert_allclose(back, read, rtol=0, atol=1e-6 * np.abs(read).max())
    else:
        np.testing.assert_array_equal(back, read)


@every_format
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_weight_is_computed_in_float32_and_rounded_once(format: Format, dtype: torch.dtype) -> None:
    weight = normal((8, 128, 3, 3) if format in ROTATED else (8, 16, 3, 3))
    back = restored(format, weight, dtype)
    assert back.dtype == dtype
    assert back.is_contiguous()
    assert torch.equal(back, restored(format, weight, torch.float32).to(dtype))


@every_format_and_shape
def test_the_weight_lies_in_memory_like_an_ordinary_one(format: Format, shape: tuple[int, ...]) -> None:
    """Also along dimensions of 1: odd strides there mean channels-last to torch, and the layers after it compute so."""
    assert restored(format, normal(shape)).stride() == torch.empty(shape).stride()


@every_packed_format
def test_the_dtype_and_the_strides_of_a_weight_do_not_matter(format: Format) -> None:
    weight = normal((8, 128, 3, 3) if format in ROTATED else (8, 16, 3, 3))
    expected = format.quantize(weight)
    for same in (weight.float(), weight.double(), weight.to(memory_format=torch.channels_last), weight.clone()):
        stored = format.quantize(same)
        assert all(torch.equal(stored[name], expected[name]) and stored[name].is_contiguous() for name in expected)


@every_format_and_shape
@pytest.mark.parametrize("value", [0.0, 0.37, -2.5, 1000.0], ids=str)
def test_a_constant_weight_comes_back(format: Format, shape: tuple[int, ...], value: float) -> None:
    weight = torch.full(shape, value, dtype=torch.float16)
    torch.testing.assert_close(restored(format, weight), weight.float(), rtol=1.01 * 2**-11, atol=0)


@every_packed_format_and_shape
def test_a_group_of_zeros_has_scale_one(format: Format, shape: tuple[int, ...]) -> None:
    stored = format.quantize(torch.zeros(shape))
    assert (stored["weight_scale"] == 1).all()
    assert (stored.get("weight_zero", torch.zeros(1)) == 0).all()
    assert (format.dequantize(stored, shape, torch.float32) == 0).all()


@every_packed_format
@pytest.mark.parametrize("size", [1e-4, 1e-6, 3e-7, 1e-7, 6e-8, 1e-12, 1e-30], ids=str)
def test_weights_too_small_for_their_scale_are_off_by_no_more_than_its_rounding(format: Format, size: float) -> None:
    weight = normal(large_enough(format), torch.float32).clamp(-2, 2) * size
    stored = format.quantize(weight)
    rows, back = (rows_of(format, w) for w in (weight, format.dequantize(stored, weight.shape, torch.float32)))
    underflown = along_rows(format, stored["weight_scale"], rows.shape[1]) == 1  # every code is that of zero
    assert torch.isfinite(back).all()
    assert not back[underflown].any()
    # float16 is spaced 2^-24 near zero, so a scale is off by 2^-25, and the end of a grid by that for each step
    bound = torch.where(underflown, 2.0 ** format.parameters()["bits"] * 2.0**-25, bounds(format, stored, rows))
    assert ((back - rows).abs() <= bound + 1e-6 * rows.abs().amax(1, keepdim=True)).all()


@every_format
@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
def test_the_largest_float16_values_stay_finite_and_close(format: Format, storage: torch.dtype) -> None:
    weight = (normal(large_enough(format)).float().clamp(-1, 1) * 60000).to(storage)
    back = restored(format, weight)
    assert torch.isfinite(back).all()
    assert relative_error(back, weight) <= relative_bound(format)


@pytest.mark.parametrize("format", PACKED, ids=lambda f: f.name)
@pytest.mark.parametrize("weight", [[3e38, 1.0, -1e38], [2e38, 2e38, 2e38]], ids=str)
def test_values_beyond_the_range_of_a_scale_are_refused_or_kept(format: Format, weight: list[float]) -> None:
    given = torch.tensor([weight * 128 if format in ROTATED else weight]).bfloat16()
    try:
        back = restored(format, given)
    except FormatError:
        return
    error = relative_error(back, given)
    assert error <= relative_bound(format)


@on_shapes([format_named(name) for name in "int4 int3-channel-sym int5-g32-rot nf4 fp8 int8".split()])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_weight_that_is_not_finite_is_refused_with_the_remedy(
    format: Format, shape: tuple[int, ...], value: float
) -> None:
    weight = normal(shape)
    weight.view(-1)[-1] = value
    with pytest.raises(FormatError, match="keep this layer at fp16"):
        format.quantize(weight)


@pytest.mark.parametrize("format", ROTATED, ids=lambda f: f.name)
def test_rotating_takes_an_outlier_off_its_group(format: Format) -> None:
    """What rotation is for: one large weight in a run no longer sets the step of the others."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    weight[:, ::32] = 20.0
    plain = format_named(format.name.removesuffix("-rot"))
    assert relative_error(restored(format, weight), weight) < 0.8 * relative_error(restored(plain, weight), weight)


@pytest.mark.parametrize("format", ROTATED, ids=lambda f: f.name)
def test_what_is_rotated_fits_only_rows_that_its_runs_divide(format: Format) -> None:
    group = format.parameters()["group"]
    assert format.fits((3, group))
    assert format.fits((3, group // 2, 2, 3))
    assert not format.fits((3, group - 1))
    assert not format.fits((3, group // 2, 3, 3))
    assert not format.fits((3, 1))


@every_format
def test_a_format_is_a_value(format: Format) -> None:
    assert from_parameters(format.name, format.parameters()) == format
    assert hash(from_parameters(format.name, dict(format.parameters()))) == hash(format)
    with pytest.raises(AttributeError):
        format.name = "other"  # type: ignore[misc]
