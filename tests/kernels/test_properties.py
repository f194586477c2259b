"""Properties of packing, bytes and layers for any weight, shape and format, checked with hypothesis."""

from __future__ import annotations

import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_formats import KINDS
from toy_formats import PACKED as PACKED_KINDS

from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.packing import pack_bits, packed_length, unpack_bits

SOON = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Shape (out, in, *kernel), float32, float16 or bfloat16, small, large, constant or mixed values."""
    kernel = draw(st.sampled_from([(), (), (3,), (3, 3), (1, 1), (2, 1, 3)]))
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 140 if not kernel else 20)), *kernel)
    made = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    scale = draw(st.sampled_from([0.0, 1e-30, 1e-6, 1e-2, 1.0, 1e3]))
    shift = draw(st.sampled_from([0.0, 0.0, 1.0, -5.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    return (made * scale + shift).to(dtype)


formats = st.sampled_from(PACKED_KINDS)


@SOON
@given(bits=st.integers(2, 8), rows=st.integers(1, 4), length=st.integers(1, 150), seed=st.integers(0, 2**32))
def test_packed_codes_round_trip(bits: int, rows: int, length: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, length), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_length(length, bits))
    assert packed_length(length, bits) == -(-length * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, length).to(torch.uint8), codes)


@SOON
@given(weight=weights(), format=formats)
def test_a_format_stores_what_it_specifies(weight: torch.Tensor, format: Format) -> None:
    if not format.fits(weight.shape):
        return
    specs = format.tensors(weight.shape, torch.float16)
    stored = format.quantize(weight)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()} == {
        n: (s.dtype, s.shape) for n, s in specs.items()
    }
    assert sum(tensor.nbytes for tensor in stored.values()) == format.nbytes(weight.shape, torch.float16)
    again = format.dequantize(stored, weight.shape, torch.float32)
    assert again.shape == weight.shape
    assert again.is_contiguous()
    assert torch.isfinite(again).all()


def where_it_rounds(format: Format, weight: torch.Tensor) -> torch.Tensor:
    """The rows that the format rounds, channels fastest, rotated if the format rotates; float64."""
    rows = weight.double().movedim(1, -1).flatten(1)
    if "rotation" not in format.parameters():
        return rows
    size = format.parameters()["group"]
    rotation = torch.from_numpy(scipy.linalg.hadamard(size)).double() / size**0.5
    return (rows.unflatten(1, (-1, size)) @ rotation).flatten(1)


def half_gap(format: Format) -> float:
    """The largest error of a weight, relative to the largest weight of its row."""
    parameters = format.parameters()
    if parameters["kind"] == "float":
        return 1 / 16 if parameters["variant"] == "e4m3" else 1 / 5  # three bits of mantissa, or one
    if parameters["kind"] == "codebook":
        return (1 - 0.6961928) / 2
    levels = 2 ** parameters["bits"]
    return 2 / levels if parameters["symmetric"] else 1 / (levels - 1)  # a symmetric grid is one step short on one side


@SOON
@given(weight=weights(), format=formats)
def test_no_weight_errs_by_more_than_the_widest_gap_between_levels(weight: torch.Tensor, format: Format) -> None:
    if not format.fits(weight.shape):
        return
    again = format.dequantize(format.quantize(weight), weight.shape, torch.float32)
    rows, back = (where_it_rounds(format, each) for each in (weight, again))
    largest = rows.abs().amax(1, keepdim=True)
    of_the_scale = 2.0**-9 * largest + 2.0 ** (format.parameters()["bits"] - 25)  # float16, which may underflow
    if format.name in ("fp8-tensor", "nvfp4"):
        of_the_scale += 2.0**-18 * largest.max()  # rows that are small for the tensor
    assert ((back - rows).abs() <= half_gap(format) * largest + of_the_scale).all()


@SOON
@given(weight=weights(), format=formats, bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_non_finite_values_are_refused(weight: torch.Tensor, format: Format, bad: float) -> None:
    if not format.fits(weight.shape):
        return
    weight = weight.clone()
    weight.view(-1)[weight.numel() // 2] = bad
    try:
        format.quantize(weight)
    except FormatError:
        return
    raise AssertionError(f"{format.name} stored {bad}")


@SOON
@given(weight=weights(), storage=st.sampled_from([torch.float16, torch.bfloat16]))
def test_bytes_are_counted_for_every_format(weight: torch.Tensor, storage: torch.dtype) -> None:
    for format in KINDS:
        if format.fits(weight.shape):
            specs = format.tensors(weight.shape, storage).values()
            assert format.nbytes(weight.shape, storage) == sum(
                torch.empty(spec.shape, dtype=spec.dtype).nbytes for spec in specs
            )
