"""The Triton kernels on a real GPU: real shapes, CUDA graphs, no synchronization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import pytest
import torch

from bitpolicy.kernels.compute import fp8 as fp8_compute
from bitpolicy.kernels.compute.int8 import multiply, quantize_input, shared, weight_codes
from bitpolicy.kernels.dispatch import run
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Compute, Geometry, Kernel, PackedWeight
from bitpolicy.kernels.triton.kernels import TritonDequantize, TritonFloat, TritonFp8, TritonInt8

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu

KERNELS = (TritonInt8(), TritonFloat(), TritonDequantize())
SAME = Geometry((1, 1), (1, 1), (1, 1))
SHAPES = {
    "SDXL feed-forward": ((2, 1024, 1280), (10240, 1280), None),
    "SDXL feed-forward out": ((2, 1024, 5120), (1280, 5120), None),
    "cross attention": ((2, 77, 2048), (1280, 2048), None),
    "a row": ((1, 3072), (18432, 3072), None),
    "64 rows": ((64, 3072), (12288, 3072), None),
    "conv 3x3": ((2, 640, 64, 64), (640, 640, 3, 3), SAME),
    "conv 3x3 of few pixels": ((2, 1280, 8, 8), (1280, 1280, 3, 3), SAME),
    "conv 3x3 with stride": ((2, 320, 64, 64), (320, 320, 3, 3), Geometry((2, 2), (1, 1), (1, 1))),
    "conv 1x1": ((2, 1920, 32, 32), (640, 1920, 1, 1), Geometry((1, 1), (0, 0), (1, 1))),
    "conv_in": ((2, 4, 128, 128), (320, 4, 3, 3), SAME),
    "conv3d": ((1, 256, 5, 32, 32), (256, 256, 3, 3, 3), Geometry((1, 1, 1), (1, 1, 1), (1, 1, 1))),
}

FORMATS = ("int8", "int4", "int4-g32-sym", "int4-channel")
before_ada = torch.cuda.get_device_capability() < (8, 9)
of_float8 = pytest.param(
    TritonFp8(), "fp8", marks=pytest.mark.skipif(before_ada, reason="needs a GPU that multiplies float8")
)


def every_kernel(*formats: str) -> pytest.MarkDecorator:
    """Each kernel with each of the formats, and the float8 kernel with its own."""
    calls = [(kernel, format) for kernel in KERNELS for format in formats]
    named = [pytest.param(*call, id=f"{call[0].name}-{call[1]}") for call in calls]
    return pytest.mark.parametrize(("kernel", "format"), [*named, of_float8])


def drawn(shape: str, format: str, dtype: torch.dtype) -> tuple[torch.Tensor, PackedWeight, torch.Tensor]:
    """Input, weight and bias."""
    torch.manual_seed(0)
    x, w, geometry = SHAPES[shape]
    found = format_named(format)
    stored = found.quantize(torch.randn(w) / prod(w[1:]) ** 0.5)
    weight = PackedWeight(found, w, {name: tensor.cuda() for name, tensor in stored.items()}, geometry)
    values = torch.randn(x, device="cuda").to(dtype)
    if values.ndim == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    return values, weight, torch.randn(w[0], device="cuda").to(dtype)


def right(kernel: Kernel, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor) -> torch.Tensor:
    """The product in float64, in which 8-bit inputs and codes are exact."""
    if not kernel.compute.rounds_inputs:
        return multiply(x.double(), weight.dequantize(torch.float32).double(), weight.geometry, bias.double())
    convolution, float8 = weight.geometry is not None, kernel.compute is Compute.FP8
    codes_of = fp8_compute.quantize_input if float8 else quantize_input
    steps, s_x = codes_of(x, shared(x.ndim, weight.shape, weight.geometry))
    w, s_w = tuple(weight.tensors.values()) if float8 else weight_codes(weight)
    channels = s_w.view(-1, *[1] * (x.ndim - 2)) if convolution else s_w
    shown = bias.view(channels.shape)
    return multiply(steps.double(), w.double(), weight.geometry) * (s_x.double() * channels.double()) + shown.double()


@every_kernel(*FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_correct_at_real_shapes(kernel: Kernel, shape: str, format: str, dtype: torch.dtype) -> None:
    x, weight, bias = drawn(shape, format, dtype)
    assert kernel.refuses(x, weight) is None
    found, exact = run(kernel, x, weight, bias), right(kernel, x, weight, bias)
    if kernel.compute is Compute.EXACT:
        assert torch.equal(found, multiply(x, weight.dequantize(dtype), weight.geometry, bias))
        return
    bound = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (found.double() - exact).norm() <= bound * exact.norm()
    assert (found.double() - exact).abs().max() <= 4 * bound * exact.abs().max()


@every_kernel("int4")
@pytest.mark.parametrize("shape", ["64 rows", "conv 3x3 of few pixels"])
def test_a_cuda_graph_gives_the_same_bits_for_new_inputs(kernel: Kernel, format: str, shape: str) -> None:
    x, weight, bias = drawn(shape, format, torch.float16)
    captured, outputs = graph_of(lambda: [run(kernel, x, weight, bias) for _ in range(3)])
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        captured.replay()
        expected = run(kernel, x, weight, bias)
        assert all(torch.equal(y, expected) for y in outputs)


def test_a_second_graph_of_the_same_input_is_independent_of_the_first() -> None:
    x, weight, bias = drawn("64 rows", "int8", torch.float16)
    graph_of(lambda: [run(TritonInt8(), x, weight, bias)])
    second, outputs = graph_of(lambda: [run(TritonInt8(), x, weight, bias)])
    x.copy_(torch.randn_like(x))
    second.replay()
    assert torch.equal(outputs[0], run(TritonInt8(), x, weight, bias))


def graph_of(call: Callable[[], list[torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A captured call, after a first one that compiled it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


@every_kernel("int8", "int4")
def test_a_call_never_waits_for_the_gpu(kernel: Kernel, format: str) -> None:
    for shape in ("64 rows", "conv 3x3"):
        x, weight, bias = drawn(shape, format, torch.float16)
        run(kernel, x, weight, bias)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(kernel, x, weight, bias)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("shape", ["SDXL feed-forward", "a row", "conv 3x3"])
def test_tuning_does_not_change_int8_products(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpolicy.kernels.triton import configs as triton_configs

    x, weight, bias = drawn(shape, "int8", torch.float16)
    untuned = run(TritonInt8(), x, weight, bias)
    monkeypatch.setattr(triton_configs, "_tuned", {})
    monkeypatch.setattr(triton_configs, "_tuning", True)
    assert torch.equal(run(TritonInt8(), x, weight, bias), untuned)
    assert triton_configs._tuned


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_kernel("int8", "int4")
def test_a_weight_on_a_gpu_that_is_not_current_is_multiplied_there(kernel: Kernel, format: str) -> None:
    x, weight, bias = drawn("64 rows", format, torch.float16)
    expected = run(kernel, x, weight, bias)
    moved = replace(weight, tensors={name: tensor.to("cuda:1") for name, tensor in weight.tensors.items()})
    found = run(kernel, x.to("cuda:1"), moved, bias.to("cuda:1"))
    assert found.device == torch.device("cuda:1")
    assert torch.equal(found.to(x.device), expected)
