"""What every kernel guarantees. A kernel that is added to the table inherits these tests, on the available devices."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from toy_formats import WITHOUT_CPP
from toy_products import DTYPES_OF, FORMATS, SHAPES, TRIED, bias_of, input_of, layouts, weight_of

from bitpolicy.kernels.compute import block_scaled
from bitpolicy.kernels.compute import fp8 as fp8_compute
from bitpolicy.kernels.compute import int8 as int8_compute
from bitpolicy.kernels.compute.fp8 import fp8_product
from bitpolicy.kernels.compute.int8 import int8_product, multiply, shared, weight_codes
from bitpolicy.kernels.cpu.blocks import CpuBlocks
from bitpolicy.kernels.dispatch import ROUNDED, TABLE, Row, prepared, run
from bitpolicy.kernels.kernel import Compute, PackedWeight

NAMES = [format.name for format in FORMATS]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative norm
SMALL_BLOCKS = CpuBlocks(least=0, block=1, channels=16)  # the one in the table is for larger weights than these
AWKWARD = 4.0  # how much larger the error of a single value may be, relative to the largest
READ_WORDS = ("cpu-float", "cpu-blocks", "cpu-dequantize")  # they need contiguous stored tensors
REFERENCES = ("reference", "int8-reference", "fp8-reference", "mxfp8-reference", "nvfp4-reference")
OF_FORMATS = {
    Compute.FP8: ("fp8", "fp8-tensor"),
    Compute.MXFP8: ("mxfp8", "mxfp4"),
    Compute.NVFP4: ("nvfp4",),
}
"""Compute modes that are for layers in certain formats."""

# The purpose of each kernel, repeated here, since otherwise a kernel that refuses everything would pass.


def is_for(kernel: str, shape: str, format: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a kernel must accept such a call, whatever `refuses` says."""
    call = SHAPES[shape]
    one_group = call.geometry is None or call.geometry.groups == 1
    in_words = format == "int8" or (format.startswith(("int4", "int8")) and "rot" not in format)
    few_rows = call.geometry is None and prod(call.input[:-1]) <= 16
    return {
        "cpu-float": few_rows and (in_words or format == "nf4"),
        "cpu-blocks": call.weight[0] % 16 == 0 and call.weight[0] > 16 and one_group and format not in WITHOUT_CPP,
        "cpu-dequantize": format not in WITHOUT_CPP,
        "cpu-int8": one_group,
        "onednn-int8": one_group,
        "triton-int8": one_group,
        "triton-fp8": one_group and format == "fp8",
        "triton-float": one_group and in_words and not format.startswith("int8-") and dtype != torch.float32,
        "triton-dequantize": in_words,
        "reference": True,
        "int8-reference": one_group,
        "fp8-reference": one_group and format in OF_FORMATS[Compute.FP8],
        "mxfp8-reference": one_group and format in OF_FORMATS[Compute.MXFP8],
        "nvfp4-reference": one_group and format in OF_FORMATS[Compute.NVFP4],
    }[kernel]


def _rows() -> list[tuple[Row, str]]:
    """Each kernel with each available device that it supports."""
    rows = [replace(row, kernel=SMALL_BLOCKS) if isinstance(row.kernel, CpuBlocks) else row for row in TABLE]
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [(row, device) for row in rows for device in here if row.device in ("any", device)]


def _param(row: Row, device: str, *more: str) -> Any:
    marks = (pytest.mark.gpu,) if device == "cuda" else ()
    return pytest.param(row, device, *more, id="-".join((row.kernel.name, device, *more)), marks=marks)


every_kernel = pytest.mark.parametrize(("row", "device"), [_param(*each) for each in _rows()])


def on(device: str, weight: PackedWeight) -> PackedWeight:
    tensors = {name: tensor.to(device) for name, tensor in weight.tensors.items()}
    return PackedWeight(weight.format, weight.shape, tensors, weight.geometry, weight.low_memory)


def dtype_for(row: Row) -> torch.dtype:
    """A dtype that the kernel accepts."""
    return torch.float16 if row.kernel.name == "triton-float" else torch.float32


def given(
    row: Row, device: str, shape: str, format: str, low_memory: bool = False
) -> tuple[torch.Tensor, PackedWeight, torch.Tensor] | None:
    """Input, weight and bias of a call that the kernel must accept; None if it need not.

    The weight is in that format, or in the only one that the kernel's compute mode supports.
    """
    format = OF_FORMATS.get(row.kernel.compute, (format,))[0]
    dtype = dtype_for(row)
    if not is_for(row.kernel.name, shape, format, dtype):
        return None
    found = weight_of(shape, format, low_memory)
    assert found is not None
    x, weight = input_of(shape, dtype).to(device), on(device, found)
    require(row, x, weight)
    return x, weight, bias_of(shape, dtype).to(device)


def calls(row: Row, device: str, shapes: str, formats: str = "int4", **how: bool) -> list[Any]:
    """The results of `given` for shapes, separated by commas, and formats, separated by spaces; each with its name.

    If the kernel supports none of them, uses a shape that every kernel supports.
    """
    pairs = [(shape.strip(), format) for shape in shapes.split(",") for format in formats.split()]
    found = [(f"{shape}, {format}", given(row, device, shape, format, **how)) for shape, format in pairs]
    taken = [(about, *call) for about, call in found if call is not None]
    return taken or calls(row, device, "linear of whole groups", formats, **how)


def require(row: Row, x: torch.Tensor, weight: PackedWeight) -> None:
    """Require that the kernel accepts the call; skip if the machine cannot run it."""
    reason = row.refuses(x, weight)
    if reason is not None and "this machine" in reason:
        pytest.skip(reason)
    assert reason is None, (weight.shape, weight.format.name, x.dtype)


def expected(row: Row, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The answer by other means: torch with dequantized weights, the definition of INT8 or FP8, or float64."""
    if row.kernel.compute is Compute.FLOAT or row.kernel.name in REFERENCES:
        return in_float64(row.kernel.compute, x, weight, bias).to(x.dtype)
    if row.kernel.compute is Compute.INT8:
        return int8_product(x, weight, bias)
    if row.kernel.compute is Compute.FP8:
        return fp8_product(x, weight, bias)
    return multiply(x, weight.dequantize(x.dtype), weight.geometry, bias)


def in_float64(compute: Compute, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of the decoded input and weight."""
    seen, w = x.double(), weight.dequantize(torch.float32).double()
    if compute in block_scaled.FORMATS:
        seen = block_scaled.rounded_input(x, weight.geometry, compute).double()
    elif compute.rounds_inputs:
        quantize_input = (fp8_compute if compute is Compute.FP8 else int8_compute).quantize_input
        steps, s_x = quantize_input(x, shared(x.ndim, weight.shape, weight.geometry))
        seen = steps.double() * s_x.double()
    if compute is Compute.INT8:
        codes, s_w = weight_codes(weight)
        w = codes.double() * s_w.double().view(-1, *[1] * (codes.ndim - 1))
    return multiply(seen, w, weight.geometry, None if bias is None else bias.double())


def assert_right(row: Row, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, about: object) -> None:
    with torch.no_grad():
        found, right = run(row.kernel, x, weight, bias), expected(row, x, weight, bias)
    assert (found.shape, found.dtype, found.device) == (right.shape, right.dtype, right.device), about
    if row.kernel.compute is Compute.EXACT and row.kernel.name not in REFERENCES:
        assert found.stride() == right.stride(), about
        torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{about}: {text}")
        return
    wrong = (found.double() - right.double()).abs()
    bound = ROUNDING[x.dtype]
    assert wrong.norm() <= bound * right.double().norm(), about
    assert right.numel() == 0 or wrong.max() <= AWKWARD * bound * right.double().abs().max(), about


@every_kernel
def test_it_accepts_exactly_the_calls_it_should(row: Row, device: str) -> None:
    """Kernels that quantize their input are only called for layers with one group."""
    for shape in SHAPES:
        for name in NAMES:
            weight = weight_of(shape, name)
            if weight is None or (row.kernel.compute.rounds_inputs and not int8_compute.suits(weight)):
                continue
            for dtype in DTYPES:
                x = input_of(shape, dtype).to(device)
                if is_for(row.kernel.name, shape, name, dtype):
                    require(row, x, on(device, weight))
                else:
                    assert row.refuses(x, on(device, weight)) is not None, (shape, name, dtype)


@every_kernel
def test_it_gives_the_right_product_in_every_shape_and_format(row: Row, device: str) -> None:
    """Also without a bias."""
    for shape, name in itertools.product(TRIED, NAMES):
        weight = weight_of(shape, name)
        weight = None if weight is None else on(device, weight)
        for dtype in DTYPES_OF[shape]:
            if weight is None or not is_for(row.kernel.name, shape, name, dtype):
                continue
            x, bias = input_of(shape, dtype).to(device), bias_of(shape, dtype).to(device)
            require(row, x, weight)
            assert_right(row, x, weight, bias, (shape, name, dtype))
            if name in ("int8", "fp8", "nvfp4"):
                assert_right(row, x, weight, None, (shape, name, dtype, "no bias"))


@every_kernel
def test_the_input_may_have_any_strides(row: Row, device: str) -> None:
    for about, contiguous, weight, bias in calls(row, device, ",".join(TRIED), "int4 int8"):
        for order, x in layouts(contiguous):
            require(row, x, weight)
            torch_gives = multiply(x, weight.dequantize(x.dtype), weight.geometry, bias).stride()
            found = row.kernel(x, weight, bias, prepared(row.kernel, weight, x.dtype))
            assert found.stride() == torch_gives, (about, order)
            assert_right(row, x, weight, bias, (about, order))


TWO = "linear of a group and a half, conv2d 3x3 with stride"
IN_ROWS_AND_PIXELS = "linear of a few rows, linear of many rows, conv2d 3x3"


@every_kernel
def test_values_may_be_huge_or_tiny(row: Row, device: str) -> None:
    sizes = (1e-30, 1e-5, 1e4, 1e30) if dtype_for(row) == torch.float32 else (1e-3, 100.0)
    for about, x, weight, _ in calls(row, device, TWO):
        for size in sizes:
            assert_right(row, x * size, weight, None, (about, size))


@every_kernel
def test_nan_and_infinity_stay_in_their_places(row: Row, device: str) -> None:
    for about, x, weight, _ in calls(row, device, f"{TWO}, conv2d 1x1, conv3d 1x3x3"):
        for value in (float("nan"), float("inf")):
            bad = x.clone()
            bad[1, 3] = value
            found, right = run(row.kernel, bad, weight, None), expected(row, bad, weight, None)
            assert torch.isnan(right[1]).any() or torch.isinf(right[1]).any(), about
            assert torch.equal(torch.isfinite(found), torch.isfinite(right)), (about, value)
            assert torch.isfinite(found[0]).all(), (about, value)


@every_kernel
def test_zeros_give_the_bias(row: Row, device: str) -> None:
    for about, x, weight, bias in calls(row, device, TWO):
        y = run(row.kernel, torch.zeros_like(x), weight, bias)
        shown = bias if y.ndim == 2 else bias.view(1, -1, *[1] * (y.ndim - 2))
        assert torch.equal(y, shown.expand_as(y)), about


@every_kernel
def test_the_same_call_gives_the_same_bits(row: Row, device: str) -> None:
    for about, x, weight, _ in calls(row, device, f"{IN_ROWS_AND_PIXELS}, conv3d"):
        first = run(row.kernel, x, weight, None)
        assert all(torch.equal(run(row.kernel, x, weight, None), first) for _ in range(3)), about


@every_kernel
def test_it_does_not_change_its_arguments(row: Row, device: str) -> None:
    for about, x, weight, bias in calls(row, device, IN_ROWS_AND_PIXELS, "int4 int8"):
        before = [t.clone() for t in (x, bias, *weight.tensors.values())]
        first = run(row.kernel, x, weight, bias)
        kept = first.clone()
        run(row.kernel, x + 1, weight, bias)
        assert torch.equal(first, kept), about  # results are not in a reused buffer
        after = (x, bias, *weight.tensors.values())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), about


@every_kernel
def test_low_memory_keeps_nothing_and_gives_the_same_result(row: Row, device: str) -> None:
    shapes = f"{IN_ROWS_AND_PIXELS}, conv2d 1x1, conv1d"
    for about, x, weight, _ in calls(row, device, shapes, "int4 int8", low_memory=True):
        assert row.kernel.prepare(weight, x.dtype) == {}, about
        assert_right(row, x, weight, None, about)


@every_kernel
def test_stored_codes_may_be_channels_last(row: Row, device: str) -> None:
    """As `model.to(memory_format=torch.channels_last)` makes the codes of `int8` and `fp8`: accepted, or refused."""
    format, reads_words = ("fp8" if row.kernel.compute is Compute.FP8 else "int8"), row.kernel.name in READ_WORDS
    if row.kernel.compute in block_scaled.FORMATS:
        pytest.skip("its codes are stored as rows")
    weight = weight_of("conv2d 3x3", format)
    assert weight is not None
    codes = weight.tensors["weight_packed"].contiguous(memory_format=torch.channels_last)
    weight = on(device, replace(weight, tensors={**weight.tensors, "weight_packed": codes}))
    for dtype in DTYPES:
        x = input_of("conv2d 3x3", dtype).to(device)
        if reads_words or not is_for(row.kernel.name, "conv2d 3x3", format, dtype):
            assert row.refuses(x, weight) is not None, dtype
            continue
        require(row, x, weight)
        assert_right(row, x, weight, None, dtype)


@every_kernel
def test_a_sample_does_not_depend_on_the_others(row: Row, device: str) -> None:
    for about, x, weight, _ in calls(row, device, IN_ROWS_AND_PIXELS):
        other = x.clone()
        other[1] *= 100
        first, again = (run(row.kernel, each, weight, None)[0] for each in (x, other))
        assert torch.equal(first, again), about


def test_names_are_unique() -> None:
    names = [row.kernel.name for row in TABLE]
    assert len({type(row.kernel) for row in TABLE}) == len(set(names))


def test_the_references_are_last_and_take_everything() -> None:
    last = TABLE[-len(REFERENCES) :]
    of_formats = {f"{compute}-reference": " ".join(names) for compute, names in OF_FORMATS.items()}
    assert {row.kernel.name: row.formats for row in last} == {"reference": "*", "int8-reference": "*", **of_formats}
    assert {row.device for row in last} == {"any"}
    assert {compute: tuple(f.name for f in formats) for compute, formats in ROUNDED.items()} == OF_FORMATS
