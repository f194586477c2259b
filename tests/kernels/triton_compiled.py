"""The machine code of the Triton kernels for GPUs that are not present. test_triton_compiled.py runs this in a separate
process, because it replaces Triton's driver and compiles where Triton would launch.

Calls use tensors with shapes but no values, so that exactly the code of such a call is compiled.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Geometry, Kernel, PackedWeight
from bitpolicy.kernels.triton import configs as triton_configs
from bitpolicy.kernels.triton import layers as triton_layers
from bitpolicy.kernels.triton.kernels import TritonDequantize, TritonFloat, TritonFp8, TritonInt8

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
GPUS = {"A100": 80, "RTX 4090": 89, "H100": 90}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


class Pretended:
    """A driver that reports a given GPU."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton stores compiled kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Code:
    """One compiled kernel: `ptx` is Triton's output, `sass` is what the GPU executes."""

    name: str
    ptx: str = field(repr=False)
    sass: str = field(repr=False)
    stack: int
    shared: int

    def writes(self, pattern: str) -> bool:
        return re.search(pattern, self.ptx) is not None

    def runs(self, instructions: str) -> bool:
        return re.search(rf"\b({instructions})[.\w]*\b", self.sass) is not None

    @property
    def local_memory(self) -> tuple[int, bool, bool]:
        """Bytes of stack, and whether there are variables or accesses in local memory."""
        return self.stack, ".local" in self.ptx, self.runs("LDL|STL")


_seen: dict[bytes, Code] = {}


def disassembled(name: str, kernel: Any, folder: Path) -> Code:
    """A launched kernel. Configurations of a product share the other kernels, so each is disassembled once."""
    code = kernel.asm["cubin"]
    if code not in _seen:
        _seen[code] = taken_apart(name, kernel, folder)
    return _seen[code]


def taken_apart(name: str, kernel: Any, folder: Path) -> Code:
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage, sass = (
        subprocess.run([TOOLS / tool, option, binary], check=True, capture_output=True, text=True).stdout
        for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
    )
    stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("STACK", "LOCAL"))  # type: ignore[index]
    return Code(name, kernel.asm["ptx"], sass, stack + local, kernel.metadata.shared)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """Names of kernels, with the code compiled where they would have been launched."""
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    triton_layers._has_warpgroups.cache_clear()
    yield compiled
    triton_layers._has_warpgroups.cache_clear()


def call(
    kernel: Kernel,
    format: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    x: tuple[int, ...],
    order: torch.memory_format = torch.channels_last,
) -> None:
    """Multiply once. A convolution keeps the size of its input, which has the given memory format."""
    found = format_named(format)
    specs = found.tensors(shape, torch.float16).items()
    stored = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs}
    slides = Geometry((1, 1), (shape[2] // 2, shape[3] // 2), (1, 1)) if len(shape) > 2 else None
    weight = PackedWeight(found, shape, stored, slides)
    values = torch.empty(x, dtype=dtype, device="meta")
    values = values.to(memory_format=order) if len(shape) > 2 else values
    bias = torch.empty(shape[0], dtype=dtype, device="meta")
    assert kernel.refuses(values, weight) is None
    y = kernel(values, weight, bias, kernel.prepare(weight, dtype))
    assert y.shape[1 if len(shape) > 2 else -1] == shape[0]


CONV = ((640, 640, 3, 3), (2, 640, 64, 64))
ONE_TAP = ((640, 1920, 1, 1), (2, 1920, 64, 64))
WIDE = ((10240, 1280), (2048, 1280))
FEW = ((1280, 5120), (16, 5120))
half, bfloat = torch.float16, torch.bfloat16
PRODUCTS = [
    (90, TritonInt8(), "int8", half, WIDE, "wgmma.*s32.s8.s8"),
    (90, TritonInt8(), "int8", half, CONV, "wgmma.*s32.s8.s8"),
    (90, TritonInt8(), "int8", half, ONE_TAP, "wgmma.*s32.s8.s8"),
    (90, TritonInt8(), "int4", half, FEW, "(wgmma|mma).*s32.s8.s8"),
    (90, TritonFloat(), "int4", half, WIDE, "wgmma.*f32.f16.f16"),
    (90, TritonFloat(), "int4", bfloat, CONV, "wgmma.*f32.bf16.bf16"),
    (90, TritonFloat(), "int8", bfloat, WIDE, "wgmma.*f32.bf16.bf16"),
    (90, TritonFloat(), "int4-g32-sym", half, FEW, "(wgmma|mma).*f32.f16.f16"),
    (89, TritonInt8(), "int8", half, CONV, "mma.sync.*s32.s8.s8"),
    (89, TritonFloat(), "int4", bfloat, WIDE, "mma.sync.*f32.bf16.bf16"),
    (90, TritonFp8(), "fp8", half, WIDE, "wgmma.*f32.e4m3.e4m3"),
    (90, TritonFp8(), "fp8", bfloat, CONV, "wgmma.*f32.e4m3.e4m3"),
    (90, TritonFp8(), "fp8", torch.float32, ONE_TAP, "wgmma.*f32.e4m3.e4m3"),
    (90, TritonFp8(), "fp8", half, FEW, "(wgmma|mma).*f32.e4m3.e4m3"),
    (89, TritonFp8(), "fp8", bfloat, WIDE, "mma.sync.*f32.e4m3.e4m3.f32"),
    (89, TritonFp8(), "fp8", half, CONV, "mma.sync.*f32.e4m3.e4m3.f32"),
    (89, TritonFp8(), "fp8", half, FEW, "mma.sync.*f32.e4m3.e4m3.f32"),
    (80, TritonInt8(), "int8", half, WIDE, "mma.sync.*s32.s8.s8"),
    (80, TritonInt8(), "int4", half, FEW, "mma.sync.*s32.s8.s8"),
    (80, TritonFloat(), "int4", half, CONV, "mma.sync.*f32.f16.f16"),
    (80, TritonFloat(), "int8", half, CONV, "mma.sync.*f32.f16.f16"),
]


@pytest.mark.parametrize(
    ("architecture", "kernel", "format", "dtype", "shapes", "instruction"),
    PRODUCTS,
    ids=lambda v: getattr(v, "name", None) or str(v),
)
def test_a_product_uses_tensor_cores_asynchronous_copies_and_registers(
    launched: list[tuple[str, Any]],
    tmp_path: Path,
    architecture: int,
    kernel: Kernel,
    format: str,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    instruction: str,
) -> None:
    driver.set_active(Pretended(architecture))
    call(kernel, format, dtype, *shapes)
    codes = [disassembled(name, compiled, tmp_path) for name, compiled in launched]
    product = next(code for code in codes if code.name == "_product")
    assert product.writes(instruction)
    assert product.runs("HGMMA|IGMMA|QGMMA|HMMA|IMMA|QMMA")
    assert product.writes(r"cp\.async\.c[ag]\.shared\.global")
    assert product.runs("LDGSTS")
    assert product.shared <= SHARED_MEMORY[architecture]
    for code in codes:
        assert code.local_memory == (0, False, False), code


# Channels that no step of a sum divides, as in latents; few outputs, as in the last layer; split sums
FIRST = ((320, 9, 3, 3), (2, 9, 64, 64))
LAST = ((4, 320, 3, 3), (2, 320, 64, 64))
ODD = ((152, 152, 3, 3), (2, 152, 8, 8))
TEXT = ((640, 768), (154, 768))
NARROW = [
    *((gpu, TritonInt8(), "int8", half, FIRST) for gpu in (80, 90)),
    *((gpu, TritonFloat(), "int4", half, FIRST) for gpu in (80, 89, 90)),
    (89, TritonFloat(), "int4-g32-sym", bfloat, FIRST),
    (90, TritonFp8(), "fp8", half, FIRST),
    (90, TritonFloat(), "int4", half, LAST),
    (89, TritonInt8(), "int4", half, ODD),
    (80, TritonFloat(), "int8", bfloat, TEXT),
]


@pytest.mark.parametrize(
    ("architecture", "kernel", "format", "dtype", "shapes"), NARROW, ids=lambda v: getattr(v, "name", None)
)
def test_every_configuration_of_a_narrow_product_stays_in_registers(
    launched: list[tuple[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: int,
    kernel: Kernel,
    format: str,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    driver.set_active(Pretended(architecture))
    ways: list[triton_configs.Config] = []

    def look(product: triton_configs.Product, *_: object) -> triton_configs.Config:
        ways[:] = triton_configs.configs(product)
        return ways[0]

    monkeypatch.setattr(triton_layers, "choose", look)
    call(kernel, format, dtype, *shapes)
    for way in ways[1:]:
        monkeypatch.setattr(triton_layers, "choose", lambda *_, way=way: way)
        call(kernel, format, dtype, *shapes)
    codes = [disassembled(name, compiled, tmp_path) for name, compiled in launched]
    assert sum(code.name == "_product" for code in codes) == len(ways) > 0
    for code in codes:
        assert code.local_memory == (0, False, False), code
        assert code.shared <= SHARED_MEMORY[architecture]


@pytest.mark.parametrize("architecture", [80, 90])
def test_weights_and_inputs_are_converted_without_local_memory(
    launched: list[tuple[str, Any]], tmp_path: Path, architecture: int
) -> None:
    driver.set_active(Pretended(architecture))
    call(TritonDequantize(), "int4", half, *CONV)
    call(TritonInt8(), "int4", half, *CONV)
    call(TritonInt8(), "int8", half, *ONE_TAP, order=torch.contiguous_format)
    call(TritonInt8(), "int8", half, *WIDE)
    names = {name for name, _ in launched}
    assert names >= {"_dequantize_affine", "_channel_scales", "_requantize"}
    assert names >= {"_reach", "_quantize_samples", "_quantize_pixels", "_quantize_rows"}
    for name, compiled in launched:
        if name != "_product":
            code = disassembled(name, compiled, tmp_path)
            assert code.local_memory == (0, False, False), code


@pytest.mark.parametrize("architecture", [89, 90])
def test_inputs_become_float8_by_arithmetic_not_by_tritons_cast(
    launched: list[tuple[str, Any]], tmp_path: Path, architecture: int
) -> None:
    driver.set_active(Pretended(architecture))
    call(TritonFp8(), "fp8", half, *CONV)
    call(TritonFp8(), "fp8", half, *ONE_TAP, order=torch.contiguous_format)
    call(TritonFp8(), "fp8", half, *WIDE)
    codes = [disassembled(name, compiled, tmp_path) for name, compiled in launched if name != "_product"]
    assert {code.name for code in codes} == {"_reach", "_quantize_samples", "_quantize_pixels", "_quantize_rows"}
    for code in codes:
        assert not code.writes(r"cvt\S*e4m3")
        assert code.local_memory == (0, False, False), code


@pytest.mark.parametrize("architecture", [89, 90])
@pytest.mark.parametrize("rows", [16, 32, 64, 2048])
def test_sums_of_float8_are_float32_from_step_to_step_in_every_tile(
    launched: list[tuple[str, Any]], tmp_path: Path, architecture: int, rows: int
) -> None:
    driver.set_active(Pretended(architecture))
    product = triton_configs.Product(rows, 1280, 5120, 5120, 8, False, 0, architecture == 90, float8=True)
    for config in triton_configs.configs(product):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_layers, "choose", lambda *_, config=config: config)
            call(TritonFp8(), "fp8", half, (1280, 5120), (rows, 5120))
    codes = [disassembled(name, compiled, tmp_path) for name, compiled in launched if name == "_product"]
    assert len(codes) >= 2
    for code in codes:
        assert code.runs("FADD"), code  # adds the tensor core's results, which have less precision
        assert code.local_memory == (0, False, False), code


def test_a_kernel_that_spills_is_found(launched: list[tuple[str, Any]], tmp_path: Path) -> None:
    """Checks the check: twice as many sums as the registers of four warps hold."""
    driver.set_active(Pretended(80))
    with pytest.MonkeyPatch.context() as patch:
        too_wide = triton_configs.Config(256, 128, 64, 4, 2)
        patch.setattr(triton_layers, "choose", lambda *_: too_wide)
        call(TritonFloat(), "int8", half, *WIDE)
    code = next(disassembled(name, compiled, tmp_path) for name, compiled in launched if name == "_product")
    assert code.stack > 0
    assert code.runs("LDL|STL")
