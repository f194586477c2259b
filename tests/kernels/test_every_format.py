"""What every format guarantees, on shapes that divide evenly and on shapes that do not.

The bounds follow from the levels in a format's specification, computed here for each kind. Rotated formats are checked
in the rotated domain, using an explicit matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import pytest
import scipy.linalg
import torch
from toy_formats import E2M1_LEVELS, KINDS, NF4_LEVELS, PACKED

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
OF_FLOATS = {"e4m3": 1 / 16, "e2m1": 1 / 5}
"""The same where the scale is not made for the row: the widest gap between levels, relative to them."""
StoredReader = Callable[[str, Mapping[str, np.ndarray], tuple[int, ...]], np.ndarray]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ROTATED = [format for format in PACKED if "rotation" in format.parameters()]

every_format = pytest.mark.parametrize("format", KINDS, ids=lambda f: f.name)
every_packed_format = pytest.mark.parametrize("format", PACKED, ids=lambda f: f.name)


def large_enough(format: Format) -> tuple[int, ...]:
    """A shape that the format fits, with a short last group if possible."""
    return (6, 128) if format in ROTATED else (6, 130)


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Realistic weights: normal, with rows of different size and a few outliers."""
    draw = torch.Generator().manual_seed(prod(shape))
    weight = torch.randn(shape, generator=draw) * torch.logspace(-3, 0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    weight.view(-1)[:: max(1, weight.numel() // 3)] *= 4
    return weight.to(dtype)


def of_powers(format: Format) -> bool:
    """Whether its scales are powers of two."""
    return format.parameters().get("scale") == "e8m0"


def restored(format: Format, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return format.dequantize(format.quantize(weight), weight.shape, dtype)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def relative_bound(format: Format) -> float:
    parameters = format.parameters()
    if format.name == "fp8":
        return OF_FLOAT8
    return OF_FLOATS[parameters["variant"]] if "variant" in parameters else RELATIVE[parameters["bits"]]


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """As bytes for numpy, which has no float8."""
    return (tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor).numpy()


def rows_of(format: Format, weight: torch.Tensor) -> torch.Tensor:
    """The weight as the rows that the format rounds, channels fastest, rotated if the format rotates; float64."""
    rows = weight.double().movedim(1, -1).flatten(1)
    if "rotation" not in format.parameters():
        return rows
    size = format.parameters()["group"]
    rotation = torch.from_numpy(scipy.linalg.hadamard(size)).double() / size**0.5
    return (rows.unflatten(1, (-1, size)) @ rotation).flatten(1)


def along_rows(format: Format, part: torch.Tensor, length: int) -> torch.Tensor:
    """Scales or zero points, repeated for each weight of a row; float64, shape (out, length)."""
    group = format.parameters()["group"]
    run = group if isinstance(group, int) else length
    of_rows = part.float().double().reshape(len(part) if part.ndim else 1, -1)
    return of_rows.repeat_interleave(run, 1)[:, :length]


def scales(format: Format, stored: Mapping[str, torch.Tensor], length: int) -> torch.Tensor:
    """The scale of each weight; float64, shape (out, length), or (1, length) if all rows share it."""
    scale = stored["weight_scale"].float() * stored.get("weight_scale_2", torch.tensor(1.0))
    return along_rows(format, scale, length)


def levels(format: Format, stored: Mapping[str, torch.Tensor], length: int) -> torch.Tensor:
    """The possible values of each weight with the stored scales; float64, shape (out, length, levels)."""
    scale = scales(format, stored, length)[..., None]
    parameters = format.parameters()
    if format.name == "int8":
        return torch.arange(-127, 128) * scale
    if parameters.get("variant") == "e2m1":
        return torch.tensor(E2M1_LEVELS).double() * scale
    if parameters.get("variant") == "e4m3":
        values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
        return values[values.isfinite()] * scale
    if format.name == "nf4":
        return torch.tensor(NF4_LEVELS).double() * scale
    codes = torch.arange(2 ** parameters["bits"])
    middle = 2 ** (parameters["bits"] - 1)
    zero = middle if parameters["symmetric"] else along_rows(format, stored["weight_zero"], length)[..., None]
    return (codes - zero) * scale


def bounds(format: Format, stored: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """The largest allowed error of each weight; float64, shape (out, K).

    Within the grid, the bound is half a step. The rounding of the float16 scale shortens the grid at the extremes, once
    per step up to there; a symmetric grid also ends one step short on the side opposite to its extreme.
    """
    scale = scales(format, stored, rows.shape[1])
    step, bits = scale.abs(), format.parameters()["bits"]
    if format.name == "int8":
        return step * 0.50001
    if "variant" in format.parameters():
        mantissa, least = {"e4m3": (3, 2.0**-9), "e2m1": (1, 0.5)}[format.parameters()["variant"]]
        finest = 6 * stored.get("weight_scale_2", torch.tensor(0.0)).double() * 2.0**-10  # of a rounded e4m3 scale
        return torch.maximum(rows.abs() / 2 ** (mantissa + 1), step * least / 2) * 1.00001 + finest
    half_step = 2.0**-11 * step + 2.0**-25  # the largest rounding error of a float16
    if format.name == "nf4":
        return step * (1 - 0.6961928) / 2 + half_step
    if not format.parameters()["symmetric"]:
        return step / 2 + (2**bits - 1) * half_step
    opposite = rows.sign() == scale.sign()
    return step * torch.where(opposite, 1.0, 0.5) + 2 ** (bits - 1) * half_step


@dataclass(frozen=True)
class Held:
    """A weight in one format: the stored tensors, and the values that the checks below use."""

    format: Format
    shape: tuple[int, ...]
    read_stored: StoredReader

    @cached_property
    def weight(self) -> torch.Tensor:
        return normal(self.shape)

    @cached_property
    def stored(self) -> dict[str, torch.Tensor]:
        return self.format.quantize(self.weight)

    @cached_property
    def back(self) -> torch.Tensor:
        return self.format.dequantize(self.stored, self.shape, torch.float32)

    @cached_property
    def rows(self) -> torch.Tensor:
        return rows_of(self.format, self.weight)

    @cached_property
    def rows_back(self) -> torch.Tensor:
        return rows_of(self.format, self.back)

    @cached_property
    def levels(self) -> torch.Tensor:
        return levels(self.format, self.stored, self.rows.shape[1])

    @cached_property
    def float32(self) -> torch.Tensor:
        """The rounding error of rotating forth and back, shape (out, 1)."""
        return 1e-6 * self.rows.abs().amax(1, keepdim=True)


def stored_tensors_match_the_specification(held: Held) -> None:
    for storage in (torch.float16, torch.bfloat16):
        announced = held.format.tensors(held.shape, storage)
        stored = held.stored if held.format.packed else held.format.quantize(held.weight.to(storage))
        assert list(stored) == list(announced)
        assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
            name: (spec.dtype, spec.shape) for name, spec in announced.items()
        }
        assert all(tensor.is_contiguous() for tensor in stored.values())


def bytes_are_exact(held: Held) -> None:
    counted = sum(len(as_bytes(t).tobytes()) for t in held.stored.values())
    assert held.format.nbytes(held.shape, torch.float16) == counted


def the_weight_has_the_strides_of_an_ordinary_one(held: Held) -> None:
    """Also for dimensions of size 1: odd strides there mean channels-last to torch, and later layers follow that."""
    assert held.back.stride() == torch.empty(held.shape).stride()


def an_independent_reader_gives_the_same_weight(held: Held) -> None:
    back = held.back.numpy()
    read = held.read_stored(held.format.name, {n: as_bytes(t) for n, t in held.stored.items()}, held.shape)
    if held.format in ROTATED:  # float32 butterflies versus a float64 product
        np.testing.assert_allclose(back, read, rtol=0, atol=1e-6 * np.abs(read).max())
    else:
        np.testing.assert_array_equal(back, read)


def the_whole_weight_is_restored_closely(held: Held) -> None:
    weight = torch.randn(held.shape, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    worst = max(relative_error(b, row) for b, row in zip(restored(held.format, weight), weight, strict=True))
    assert worst <= relative_bound(held.format)


def zero_stays_zero(held: Held) -> None:
    weight = held.weight.clone()
    weight.view(-1)[::3] = 0
    back = restored(held.format, weight).view(-1)
    assert (back[::3] == 0).all()
    assert back.any() == weight.any()


def a_constant_weight_is_restored(held: Held) -> None:
    """With a scale that is a power of two: within half a step."""
    for value in (0.0, 0.37, -2.5, 1000.0):
        weight = torch.full(held.shape, value, dtype=torch.float16)
        bound = relative_bound(held.format) if of_powers(held.format) else 1.01 * 2**-11
        torch.testing.assert_close(restored(held.format, weight), weight.float(), rtol=bound, atol=0)


def each_weight_is_restored_within_half_a_step(held: Held) -> None:
    bound = bounds(held.format, held.stored, held.rows)
    assert ((held.rows_back - held.rows).abs() <= bound + held.float32).all()


def no_other_code_is_nearer_with_the_stored_scale(held: Held) -> None:
    away = (held.levels - held.rows[..., None]).abs().amin(-1)
    assert ((held.rows_back - held.rows).abs() <= away * (1 + 1e-4) + held.float32).all()


def every_restored_weight_is_a_level(held: Held) -> None:
    off = (held.levels - held.rows_back[..., None]).abs().amin(-1)
    assert (off <= 1e-6 * held.rows_back.abs().amax(1, keepdim=True)).all()


def a_group_of_zeros_has_scale_one(held: Held) -> None:
    """Or, where a scale is a power of two, the smallest one."""
    stored = held.format.quantize(torch.zeros(held.shape))
    assert (stored["weight_scale"].float() == (2.0**-127 if of_powers(held.format) else 1)).all()
    assert stored.get("weight_scale_2", 1) == 1
    assert (stored.get("weight_zero", torch.zeros(1)) == 0).all()
    assert (held.format.dequantize(stored, held.shape, torch.float32) == 0).all()


def a_non_finite_weight_is_refused_with_a_remedy(held: Held) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        weight = held.weight.clone()
        weight.view(-1)[-1] = value
        with pytest.raises(FormatError, match="keep this layer at fp16"):
            held.format.quantize(weight)


OF_EVERY_FORMAT = (
    stored_tensors_match_the_specification,
    bytes_are_exact,
    the_weight_has_the_strides_of_an_ordinary_one,
    an_independent_reader_gives_the_same_weight,
    the_whole_weight_is_restored_closely,
    a_constant_weight_is_restored,
)
OF_PACKED_ONES = (
    each_weight_is_restored_within_half_a_step,
    no_other_code_is_nearer_with_the_stored_scale,
    every_restored_weight_is_a_level,
    a_group_of_zeros_has_scale_one,
    a_non_finite_weight_is_refused_with_a_remedy,
)


@every_format
def test_a_format_keeps_its_promises(format: Format, read_stored: StoredReader) -> None:
    """On every shape it fits. The error names every broken guarantee; the traceback is that of the first."""
    promises = [*OF_EVERY_FORMAT, *(OF_PACKED_ONES if format.packed else ())]
    if format not in ROTATED:
        promises.append(zero_stays_zero)
    broken: list[tuple[str, AssertionError]] = []
    for about, shape in SHAPES.items():
        held = Held(format, shape, read_stored) if format.fits(shape) else None
        for promise in promises if held else ():
            try:
                promise(held)
            except (AssertionError, pytest.fail.Exception) as error:
                broken.append((f"{promise.__name__} ({about})", error))
    if broken:
        raise AssertionError(f"broken: {', '.join(name for name, _ in broken)}") from broken[0][1]


@every_format
def test_the_weight_is_computed_in_float32_and_rounded_once(format: Format) -> None:
    weight = normal((8, 128, 3, 3) if format in ROTATED else (8, 16, 3, 3))
    stored = format.quantize(weight)
    wide = format.dequantize(stored, weight.shape, torch.float32)
    for dtype in FLOATS:
        back = format.dequantize(stored, weight.shape, dtype)
        assert back.dtype == dtype
        assert back.is_contiguous()
        assert torch.equal(back, wide.to(dtype))


@every_packed_format
def test_the_dtype_and_the_strides_of_a_weight_do_not_matter(format: Format) -> None:
    weight = normal((8, 128, 3, 3) if format in ROTATED else (8, 16, 3, 3))
    expected = format.quantize(weight)
    for same in (weight.float(), weight.double(), weight.to(memory_format=torch.channels_last), weight.clone()):
        stored = format.quantize(same)
        assert all(torch.equal(stored[name], expected[name]) and stored[name].is_contiguous() for name in expected)


@every_packed_format
def test_weights_too_small_for_their_scale_err_by_at_most_its_rounding(format: Format) -> None:
    for size in (1e-4, 1e-6, 3e-7, 1e-7, 6e-8, 1e-12, 1e-30):
        weight = normal(large_enough(format), torch.float32).clamp(-2, 2) * size
        stored = format.quantize(weight)
        rows, back = (rows_of(format, w) for w in (weight, format.dequantize(stored, weight.shape, torch.float32)))
        underflown = (scales(format, stored, rows.shape[1]) == 1).expand_as(back)  # every code is the zero code
        assert torch.isfinite(back).all(), size
        assert not back[underflown].any(), size
        # float16 has a spacing of 2^-24 near zero, so a scale errs by 2^-25, and the end of a grid by that per step
        bound = torch.where(underflown, 2.0 ** format.parameters()["bits"] * 2.0**-25, bounds(format, stored, rows))
        assert ((back - rows).abs() <= bound + 1e-6 * rows.abs().amax(1, keepdim=True)).all(), size


@every_format
def test_the_largest_float16_values_stay_finite_and_close(format: Format) -> None:
    for storage in (torch.float16, torch.bfloat16):
        weight = (normal(large_enough(format)).float().clamp(-1, 1) * 60000).to(storage)
        back = restored(format, weight)
        assert torch.isfinite(back).all(), storage
        assert relative_error(back, weight) <= relative_bound(format), storage


@every_packed_format
def test_values_beyond_the_range_of_a_scale_are_refused_or_stored(format: Format) -> None:
    """Formats with a float16 scale refuse; formats with a float32 scale store them; those with a power of two refuse
    where the largest level would be infinite."""
    for values in ([3e38, 1.0, -1e38], [2e38, 2e38, 2e38]):
        given = torch.tensor([values * 128 if format in ROTATED else values]).bfloat16()
        if format.name in ("int8", "fp8", "fp8-tensor", "nvfp4") or (format.name[:2], values[0]) == ("mx", 2e38):
            assert relative_error(restored(format, given), given) <= relative_bound(format), values
        else:
            with pytest.raises(FormatError):
                format.quantize(given)


@pytest.mark.parametrize("format", ROTATED, ids=lambda f: f.name)
def test_rotation_spreads_an_outlier(format: Format) -> None:
    """The purpose of rotation: one large weight in a group no longer sets the step of the others."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    weight[:, ::32] = 20.0
    plain = format_named(format.name.removesuffix("-rot"))
    assert relative_error(restored(format, weight), weight) < 0.8 * relative_error(restored(plain, weight), weight)


@pytest.mark.parametrize("format", ROTATED, ids=lambda f: f.name)
def test_rotated_formats_fit_only_rows_of_whole_groups(format: Format) -> None:
    group = format.parameters()["group"]
    assert format.fits((3, group))
    assert format.fits((3, group // 2, 2, 3))
    assert not format.fits((3, group - 1))
    assert not format.fits((3, group // 2, 3, 3))
    assert not format.fits((3, 1))


def test_formats_are_immutable_values() -> None:
    for format in KINDS:
        assert from_parameters(format.name, format.parameters()) == format
        assert hash(from_parameters(format.name, dict(format.parameters()))) == hash(format)
        with pytest.raises(AttributeError):
            format.name = "other"  # type: ignore[misc]
