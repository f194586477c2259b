"""Dequantization in C++ gives the bits of the plain torch code for every format."""

from __future__ import annotations

import threading

import pytest
import torch
from toy_formats import PACKED, WITHOUT_CPP

from bitpolicy.kernels.compute.reference import Reference
from bitpolicy.kernels.cpu import dequantize as cpu_dequantize
from bitpolicy.kernels.cpu.exact import CpuDequantize
from bitpolicy.kernels.cpu.scratch import release_scratch, scratch, scratch_bytes, scratch_tensor
from bitpolicy.kernels.formats.convrot import ConvRot
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Geometry, PackedWeight

pytestmark = pytest.mark.usefixtures("cpp_kernels")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    *((6, 128), (5, 101), (3, 7), (2, 1), (1, 513), (4, 6, 3), (8, 16, 3, 3), (8, 24, 1, 1), (3, 128, 1, 3)),
    *(
        (3, 5, 2, 3),
        (8, 1, 3, 3),
        (4, 3, 2, 3, 3),
        (2, 320, 3, 3),
        (3, 96, 3, 3),
        (2, 152, 3, 3),
        (3, 264, 3, 3),
        (2, 8, 3, 3),
        (2, 264, 2, 2),
        (3, 130, 5),
    ),
)


def packed(format: Format, shape: tuple[int, ...], size: float = 1.0) -> PackedWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    return PackedWeight(format, shape, format.quantize(weight))


def assert_same_bits(found: torch.Tensor, right: torch.Tensor) -> None:
    bits = {2: torch.int16, 4: torch.int32}[right.dtype.itemsize]
    assert (found.shape, found.dtype, found.stride()) == (right.shape, right.dtype, right.stride())
    assert torch.equal(found.view(bits), right.view(bits))  # distinguishes negative from positive zero


@pytest.mark.parametrize("format", PACKED, ids=lambda f: f.name)
def test_every_format_gives_the_bits_of_plain_torch(format: Format) -> None:
    for shape in SHAPES:
        weight = packed(format, shape) if format.fits(shape) else None
        for dtype in DTYPES if weight is not None and not isinstance(format, ConvRot) else ():
            found = torch.full(shape, torch.nan, dtype=dtype)
            if format.name in WITHOUT_CPP:
                assert cpu_dequantize.refuses(weight, dtype) == f"not for {format.name}"
                continue
            assert cpu_dequantize.refuses(weight, dtype) is None
            assert_same_bits(cpu_dequantize.dequantize(weight, found), weight.dequantize(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [3e-8, 1e-5, 1e3])
def test_weights_outside_the_normal_range_of_float16_are_rounded_as_in_torch(dtype: torch.dtype, size: float) -> None:
    """Subnormal and infinite float16 values."""
    for name in ("int8", "fp8", "int4-g32", "nf4", "int3-g32-rot"):
        weight = packed(format_named(name), (7, 96), size)
        scaled = {
            n: t * 80 if n == "weight_scale" and t.dtype == torch.float32 else t for n, t in weight.tensors.items()
        }
        weight = PackedWeight(weight.format, weight.shape, scaled)
        assert_same_bits(cpu_dequantize.dequantize(weight, torch.empty(7, 96, dtype=dtype)), weight.dequantize(dtype))


def test_every_float8_value_equals_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    tensors = {"weight_packed": codes, "weight_scale": torch.tensor([3.0])}
    weight = PackedWeight(format_named("fp8"), (1, 256), tensors)
    found = cpu_dequantize.dequantize(weight, torch.empty(1, 256))
    torch.testing.assert_close(found, weight.dequantize(torch.float32), rtol=0, atol=0, equal_nan=True)


def test_threads_change_nothing() -> None:
    weight, before = packed(format_named("int4"), (37, 40, 3, 3)), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = cpu_dequantize.dequantize(weight, torch.empty(weight.shape))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found, weight.dequantize(torch.float32))


def test_unsupported_calls_are_refused() -> None:
    convrot = packed(format_named("int4-convrot64"), (4, 64))
    assert "int4-convrot64" in str(cpu_dequantize.refuses(convrot, torch.float32))
    int4 = packed(format_named("int4"), (4, 64))
    assert "float64" in str(cpu_dequantize.refuses(int4, torch.float64))
    strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in int4.tensors.items()}
    assert "contiguous" in str(cpu_dequantize.refuses(PackedWeight(int4.format, int4.shape, strided), torch.float32))


def test_a_recorded_weight_outlives_the_next_call() -> None:
    """In scratch memory, the second layer's weight would be used for the first one's gradient."""
    kernel, first, second = (
        CpuDequantize(),
        packed(format_named("int4"), (6, 64)),
        packed(format_named("int8"), (6, 64)),
    )
    x = torch.randn(3, 64, requires_grad=True)
    y = kernel(x, first, None, {})
    kernel(x.detach(), second, None, {})
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, first.dequantize(torch.float32).sum(0).expand(3, 64))


def test_a_recorded_bias_alone_is_recorded_too() -> None:
    kernel, weight = CpuDequantize(), packed(format_named("int4"), (6, 8, 3, 3))
    weight = PackedWeight(weight.format, weight.shape, weight.tensors, Geometry((1, 1), (1, 1), (1, 1)))
    bias = torch.zeros(6, requires_grad=True)
    kernel(torch.randn(1, 8, 4, 4), weight, bias, {}).sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((6,), 16.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_equal_the_reference_bit_for_bit(dtype: torch.dtype) -> None:
    for shape, geometry in (((40, 72), None), ((12, 40, 3, 3), Geometry((2, 1), (1, 0), (1, 2)))):
        weight = packed(format_named("int4"), shape)
        weight = PackedWeight(weight.format, shape, weight.tensors, geometry)
        x = torch.randn(3, 72) if geometry is None else torch.randn(2, 40, 9, 11)
        for lying in (x, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.t().contiguous().t()):
            found = CpuDequantize()(lying.to(dtype), weight, None, {})
            assert_same_bits(found, Reference()(lying.to(dtype), weight, None, {}))


def test_each_thread_has_one_scratch_buffer() -> None:
    release_scratch()
    small, large = scratch_tensor((3, 5), torch.float32), scratch(1000)
    assert scratch_bytes() == 1000
    assert scratch_tensor((3, 5), torch.float32).data_ptr() == large.data_ptr() != small.data_ptr()
    theirs: list[int] = []
    other = threading.Thread(target=lambda: theirs.append(scratch(8).data_ptr()))
    other.start()
    other.join()
    assert theirs != [large.data_ptr()]
    release_scratch()
    assert scratch_bytes() == 0
