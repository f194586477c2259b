"""What every kernel promises. One that is added to the table inherits these tests, on the devices that there are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_products import FORMATS, SHAPES, bias_of, input_of, layouts, weight_of

from bitpolicy.kernels.compute.fp8 import fp8_product
from bitpolicy.kernels.compute.int8 import int8_product, multiply
from bitpolicy.kernels.cpu.blocks import CpuBlocks
from bitpolicy.kernels.dispatch import TABLE, Row, effective, prepared, run
from bitpolicy.kernels.kernel import Compute, PackedWeight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative norm
SMALL_BLOCKS = CpuBlocks(least=0, block=1, channels=16)  # in the table it is for weights larger than any here
AWKWARD = 4.0  # how much worse a single value may be, against the largest


def _params() -> list[Any]:
    """Each kernel on each device it is for."""
    rows = [replace(row, kernel=SMALL_BLOCKS) if isinstance(row.kernel, CpuBlocks) else row for row in TABLE]
    pairs = [(row, device) for row in rows for device in ("cpu", "cuda") if row.device in ("any", device)]
    marks = {"cpu": (), "cuda": (pytest.mark.gpu,)}
    return [pytest.param(row, device, id=f"{row.kernel.name}-{device}", marks=marks[device]) for row, device in pairs]


every_kernel = pytest.mark.parametrize(("row", "device"), _params())
every_shape = pytest.mark.parametrize("shape", SHAPES)


def on(device: str, weight: PackedWeight) -> PackedWeight:
    tensors = {name: tensor.to(device) for name, tensor in weight.tensors.items()}
    return PackedWeight(weight.format, weight.shape, tensors, weight.geometry, weight.low_memory)


def expected(row: Row, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The answer by other means: torch on dequantized weights, the definition of INT8 or FP8, or float64."""
    if row.kernel.compute is Compute.EXACT:
        return multiply(x, weight.dequantize(x.dtype), weight.geometry, bias)
    if row.kernel.compute is Compute.INT8:
        return int8_product(x, weight, bias)
    if row.kernel.compute is Compute.FP8:
        return fp8_product(x, weight, bias)
    wide = None if bias is None else bias.double()
    return multiply(x.double(), weight.dequantize(torch.float32).double(), weight.geometry, wide).to(x.dtype)


def assert_right(row: Row, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> None:
    with torch.no_grad():
        found, right = run(row.kernel, x, weight, bias), expected(row, x, weight, bias)
    assert (found.shape, found.dtype, found.device) == (right.shape, right.dtype, right.device)
    if row.kernel.compute is Compute.EXACT:
        torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)
        assert found.stride() == right.stride()
        return
    wrong = (found.double() - right.double()).abs()
    bound = ROUNDING[x.dtype]
    assert wrong.norm() <= bound * right.double().norm()
    assert right.numel() == 0 or wrong.max() <= AWKWARD * bound * right.double().abs().max()


def takes(row: Row, x: torch.Tensor, weight: PackedWeight | None) -> bool:
    suited = weight is not None and effective(row.kernel.compute, weight) is row.kernel.compute
    return suited and weight is not None and row.refuses(x, weight) is None


def weight_for(row: Row, shape: str, format: str, low_memory: bool = False) -> PackedWeight | None:
    """A weight in that format, or in the only one that the kernel's compute is for."""
    return weight_of(shape, "fp8" if row.kernel.compute is Compute.FP8 else format, low_memory)


@every_kernel
@every_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_gives_the_right_product_in_every_format(row: Row, device: str, shape: str, dtype: torch.dtype) -> None:
    x, bias = input_of(shape, dtype).to(device), bias_of(shape, dtype).to(device)
    weights = [weight_of(shape, format.name) for format in FORMATS]
    taken = [on(device, weight) for weight in weights if takes(row, x, weight)]
    if not taken:
        pytest.skip("refused")
    for weight in taken:
        assert_right(row, x, weight, bias)


@every_kernel
def test_it_takes_some_calls(row: Row, device: str) -> None:
    """Or none of these tests would say anything; a kernel that this machine cannot run says why."""
    inputs = [(shape, input_of(shape, dtype).to(device)) for shape in SHAPES for dtype in DTYPES]
    calls = [(x, weight_of(shape, format.name)) for shape, x in inputs for format in FORMATS]
    reasons = [row.refuses(x, on(device, weight)) for x, weight in calls if weight is not None]
    if None not in reasons and any("this machine" in str(reason) for reason in reasons):
        pytest.skip(str(next(r for r in reasons if "this machine" in str(r))))
    assert None in reasons, set(reasons)


@every_kernel
@every_shape
def test_it_does_without_a_bias(row: Row, device: str, shape: str) -> None:
    x, weight = input_of(shape).to(device), weight_for(row, shape, "int8")
    if not takes(row, x, weight):
        pytest.skip("refused")
    assert_right(row, x, on(device, weight), None)


@every_kernel
@every_shape
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_the_input_may_lie_in_any_order(row: Row, device: str, shape: str, format: str) -> None:
    weight, bias = weight_for(row, shape, format), bias_of(shape).to(device)
    for about, x in layouts(input_of(shape).to(device)):
        if takes(row, x, weight):
            found = row.kernel(x, on(device, weight), bias, prepared(row.kernel, on(device, weight), x.dtype))
            right = expected(row, x, on(device, weight), bias)
            assert found.stride() == right.stride(), about
            assert_right(row, x, on(device, weight), bias)


@every_kernel
@pytest.mark.parametrize("size", [1e-30, 1e-5, 1e4, 1e30])
@pytest.mark.parametrize("shape", ["linear of a group and a half", "conv2d 3x3"])
def test_values_may_be_huge_or_tiny(row: Row, device: str, shape: str, size: float) -> None:
    x, weight = input_of(shape).to(device) * size, weight_for(row, shape, "int4")
    if not takes(row, x, weight):
        pytest.skip("refused")
    assert_right(row, x, on(device, weight), None)


@every_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", ["linear of a group and a half", "conv2d 3x3", "conv2d 1x1", "conv3d 1x3x3"])
def test_nan_and_infinity_come_out_where_they_should(row: Row, device: str, shape: str, value: float) -> None:
    x, weight = input_of(shape).to(device), weight_for(row, shape, "int4")
    if not takes(row, x, weight):
        pytest.skip("refused")
    x[1, 3] = value
    weight = on(device, weight)
    found, right = run(row.kernel, x, weight, None), expected(row, x, weight, None)
    assert torch.isnan(right[1]).any() or torch.isinf(right[1]).any()
    assert torch.equal(torch.isfinite(found), torch.isfinite(right))
    assert torch.isfinite(found[0]).all()


@every_kernel
@pytest.mark.parametrize("shape", ["linear of a group and a half", "conv2d 3x3"])
def test_zeros_give_the_bias(row: Row, device: str, shape: str) -> None:
    x, weight, bias = (
        torch.zeros_like(input_of(shape)).to(device),
        weight_for(row, shape, "int4"),
        bias_of(shape).to(device),
    )
    if not takes(row, x, weight):
        pytest.skip("refused")
    y = run(row.kernel, x, on(device, weight), bias)
    shown = bias if y.ndim == 2 else bias.view(1, -1, *[1] * (y.ndim - 2))
    assert torch.equal(y, shown.expand_as(y))


@every_kernel
@pytest.mark.parametrize("shape", ["linear of a few rows", "linear of many rows", "conv2d 3x3", "conv3d"])
def test_the_same_call_gives_the_same_bits(row: Row, device: str, shape: str) -> None:
    x, weight = input_of(shape).to(device), weight_for(row, shape, "int4")
    if not takes(row, x, weight):
        pytest.skip("refused")
    weight = on(device, weight)
    first = run(row.kernel, x, weight, None)
    assert all(torch.equal(run(row.kernel, x, weight, None), first) for _ in range(3))


@every_kernel
@pytest.mark.parametrize("shape", ["linear of a few rows", "linear of many rows", "conv2d 3x3"])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_it_writes_to_none_of_what_it_is_given(row: Row, device: str, shape: str, format: str) -> None:
    x, weight, bias = input_of(shape).to(device), weight_for(row, shape, format), bias_of(shape).to(device)
    if not takes(row, x, weight):
        pytest.skip("refused")
    weight = on(device, weight)
    before = [t.clone() for t in (x, bias, *weight.tensors.values())]
    first = run(row.kernel, x, weight, bias)
    kept = first.clone()
    run(row.kernel, x + 1, weight, bias)
    assert torch.equal(first, kept)  # a reused buffer is never handed out
    assert all(torch.equal(a, b) for a, b in zip(before, (x, bias, *weight.tensors.values()), strict=True))


@every_kernel
@pytest.mark.parametrize("shape", ["linear of a few rows", "linear of many rows", "conv2d 3x3", "conv2d 1x1", "conv1d"])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_with_little_memory_it_keeps_nothing_and_gives_the_same(row: Row, device: str, shape: str, format: str) -> None:
    x, weight = input_of(shape).to(device), weight_for(row, shape, format, low_memory=True)
    if not takes(row, x, weight):
        pytest.skip("refused")
    weight = on(device, weight)
    assert row.kernel.prepare(weight, x.dtype) == {}
    assert_right(row, x, weight, None)


@every_kernel
def test_stored_codes_may_lie_channels_last(row: Row, device: str) -> None:
    """As `model.to(memory_format=torch.channels_last)` leaves those of `int8` and `fp8`."""
    weight = weight_for(row, "conv2d 3x3", "int8")
    codes = weight.tensors["weight_packed"].contiguous(memory_format=torch.channels_last)
    weight = on(device, replace(weight, tensors={**weight.tensors, "weight_packed": codes}))
    for dtype in DTYPES:
        x = input_of("conv2d 3x3", dtype).to(device)
        if takes(row, x, weight):
            assert_right(row, x, weight, None)


@every_kernel
@pytest.mark.parametrize("shape", ["linear of a few rows", "linear of many rows", "conv2d 3x3"])
def test_a_sample_does_not_depend_on_the_others(row: Row, device: str, shape: str) -> None:
    x, weight = input_of(shape).to(device), weight_for(row, shape, "int4")
    if not takes(row, x, weight):
        pytest.skip("refused")
    weight = on(device, weight)
    other = x.clone()
    other[1] *= 100
    assert torch.equal(run(row.kernel, x, weight, None)[0], run(row.kernel, other, weight, None)[0])


def test_names_are_unique() -> None:
    names = [row.kernel.name for row in TABLE]
    assert len({type(row.kernel) for row in TABLE}) == len(set(names))


def test_the_references_are_last_and_take_everything() -> None:
    assert {row.kernel.name: row.formats for row in TABLE[-3:]} == {
        "reference": "*",
        "int8-reference": "*",
        "fp8-reference": "fp8",  # what else there is does not get that compute
    }
    assert {row.device for row in TABLE[-3:]} == {"any"}
