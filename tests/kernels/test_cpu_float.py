"""The product of a few rows that dequantizes in registers: exact weights, all tail sizes, any vector width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpolicy.kernels import micro_probe
from bitpolicy.kernels.cpu import extension as cpu_extension
from bitpolicy.kernels.cpu.float import CpuFloat
from bitpolicy.kernels.dispatch import TABLE, choose
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Compute, Geometry, PackedWeight

pytestmark = pytest.mark.usefixtures("cpp_kernels")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = "int4 int4-sym int4-g32 int4-g128 int4-channel int4-channel-sym nf4 int8 int8-g64-asym int8-g32-sym".split()
# (out, K): strips of four channels and remainders; whole blocks of 32, all remainders, less than a block
SHAPES = ((4, 64), (7, 320), (5, 67), (3, 33), (1, 31), (9, 1), (6, 130), (2, 200))
FLAGS = {"the oldest x86-64": "-march=x86-64", "AVX2": "-march=x86-64-v3"}


def packed(name: str, out: int, length: int) -> PackedWeight:
    """Rows that differ in size and are off zero, so that no two groups share a scale or a zero point."""
    generator = torch.Generator().manual_seed(length)
    size = torch.rand(out, length, generator=generator).cumsum(1).add_(0.1) * (1 + torch.arange(out))[:, None]
    weight = (torch.randn(out, length, generator=generator) + 0.5) * size
    format = format_named(name)
    return PackedWeight(format, (out, length), format.quantize(weight))


def assert_close(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, bound: float) -> None:
    found = CpuFloat()(x, weight, bias, {})
    wide = None if bias is None else bias.double()
    right = torch.nn.functional.linear(x.double(), weight.dequantize(torch.float32).double(), wide)
    assert (found.dtype, found.shape) == (x.dtype, right.shape)
    assert (found.double() - right).norm() <= bound * right.norm(), (x.shape, x.dtype)
    assert (found.double() - right).abs().max() <= 4 * bound * right.abs().max(), (x.shape, x.dtype)


def assert_bits_of_each_weight(weight: PackedWeight) -> None:
    """A row that is one at k and zero elsewhere gives the weights at k, with nothing added."""
    for rows in torch.eye(weight.row_length).split(7):
        picked = weight.dequantize(torch.float32) @ rows.T  # one product, and zeros
        assert torch.equal(CpuFloat()(rows, weight, None, {}), picked.T), weight.shape


@pytest.mark.parametrize("name", FORMATS)
def test_each_weight_has_the_bits_of_the_format(name: str) -> None:
    for shape in SHAPES:
        assert_bits_of_each_weight(packed(name, *shape))


@pytest.mark.parametrize("name", FORMATS)
def test_sums_are_correct_for_any_number_of_rows(name: str) -> None:
    weight, bias = packed(name, 7, 200), torch.randn(7)
    for rows in range(1, 17):
        for dtype, bound in zip(DTYPES, (2e-6, 1e-3, 8e-3), strict=True):
            x = torch.randn(rows, 200).to(dtype)
            assert_close(x, weight, None, bound)
            assert_close(x, weight, bias.to(dtype), bound)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_rows_result_does_not_depend_on_other_rows(name: str) -> None:
    weight, x = packed(name, 7, 200), torch.randn(16, 200)
    alone = torch.cat([CpuFloat()(row, weight, None, {}) for row in x.split(1)])
    for rows in (2, 3, 5, 8, 16):
        assert torch.equal(CpuFloat()(x[:rows], weight, None, {}), alone[:rows])


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_threads_change_nothing(name: str) -> None:
    weight, x, before = packed(name, 701, 320), torch.randn(3, 320), torch.get_num_threads()
    right = CpuFloat()(x, weight, None, {})
    torch.set_num_threads(3)
    try:
        found = CpuFloat()(x, weight, None, {})
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, right)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_processors_without_wide_vectors_compute_the_same(
    flags: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BITPOLICY_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_extension, "_FLAGS", ["-std=c++17", "-O1", flags, "-fPIC", "-ffp-contract=off", "-w"])
    try:
        library = cpu_extension.build()
    except cpu_extension.Unavailable as reason:
        pytest.skip(f"this compiler does not know {flags}: {reason}")
    monkeypatch.setattr(cpu_extension, "library", lambda: library)
    for name in FORMATS:
        for shape in ((7, 320), (5, 67)):
            weight = packed(name, *shape)
            assert_bits_of_each_weight(weight)
            for dtype, bound in zip(DTYPES, (2e-6, 1e-3, 8e-3), strict=True):
                assert_close(torch.randn(11, shape[1]).to(dtype), weight, torch.randn(shape[0]).to(dtype), bound)


@pytest.mark.parametrize(
    ("name", "rows", "dtype", "why"),
    [
        ("int4", 17, torch.float32, "for at most 16 rows"),
        ("int4", 2, torch.float64, "not for torch.float64"),
        ("int3", 2, torch.float32, "not for int3"),
        ("int4-rot", 2, torch.float32, "not for int4-rot"),
        ("fp8", 2, torch.float32, "not for fp8"),
    ],
)
def test_unsupported_calls_are_refused(name: str, rows: int, dtype: torch.dtype, why: str) -> None:
    assert CpuFloat().refuses(torch.zeros(rows, 64, dtype=dtype), packed(name, 4, 64)) == why


def test_it_serves_only_linear_layers() -> None:
    row = next(row for row in TABLE if row.kernel.name == "cpu-float")
    format, shape = format_named("int4"), (4, 64, 1, 1)
    conv = PackedWeight(format, shape, format.quantize(torch.randn(shape)), Geometry((1, 1), (0, 0), (1, 1)))
    assert row.refuses(torch.zeros(1, 64, 1, 1), conv) == "for linear"
    assert row.refuses(torch.zeros(1, 64), packed("int4", 4, 64)) is None


def chosen(x: torch.Tensor, compute: Compute) -> str:
    return choose(x, packed("int4", 40, 64), None, compute).name


def test_it_is_timed_where_sums_may_run_in_another_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITPOLICY_CACHE", str(tmp_path))
    monkeypatch.delenv("BITPOLICY_KERNELS", raising=False)
    monkeypatch.setattr("bitpolicy.kernels.dispatch._chosen", {})
    micro_probe.forget()
    seconds: Callable[..., Any] = lambda multiply, device: 0.0 if "CpuFloat" in repr(multiply) else 1.0  # noqa: E731
    monkeypatch.setattr(micro_probe, "_seconds", seconds)
    few, many = torch.randn(2, 64), torch.randn(17, 64)
    assert chosen(few, Compute.FLOAT) == "cpu-float"
    assert chosen(few, Compute.EXACT) == "cpu-dequantize"
    assert chosen(many, Compute.FLOAT) == "cpu-dequantize"
    micro_probe.forget()
