"""`fp8-tensor`, `fp8`, `mxfp8`, `mxfp4` and `nvfp4` against the packages that write them for GPUs, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.formats.elements import E2M1, E4M3
from bitpolicy.kernels.formats.named import format_named

F32, DTYPES = torch.float32, (torch.float32, torch.float16, torch.bfloat16)
ZEROS = slice(32, 64)  # of row 3


def weight(dtype: torch.dtype) -> torch.Tensor:
    """Rows whose sizes span three orders of magnitude, some outliers, blocks of zeros; 250 rows are no whole tile."""
    draw = torch.Generator().manual_seed(0)
    made = torch.randn(250, 512, generator=draw) * torch.logspace(-3, 0, 250)[:, None]
    made.view(-1)[::1001] *= 8
    made[3, ZEROS] = 0
    return made.to(dtype)


def ours(name: str, given: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors, one-byte floats by their bytes."""
    stored = format_named(name).quantize(given)
    return {suffix: as_bytes(tensor) for suffix, tensor in stored.items()}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def comfy(given: torch.Tensor) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(format, suffix, tensor) of comfy-kitchen's own code, its tiles and nibbles in our order."""
    code = pytest.importorskip("comfy_kitchen.backends.eager.quantization", reason="pip install comfy-kitchen")
    from comfy_kitchen.float_utils import from_blocked, swap_nibbles

    rows, columns = given.shape
    top = given.float().abs().amax()
    codes = code.quantize_per_tensor_fp8(given.float(), top / 448)
    yield "fp8-tensor", "weight_packed", codes
    codes, scale = code.quantize_nvfp4(given, top / (6 * 448), pad_16x=True)
    yield "nvfp4", "weight_packed", swap_nibbles(codes)[:rows]
    yield "nvfp4", "weight_scale", from_blocked(scale, -(-rows // 16) * 16, columns // 16)[:rows]
    codes, scale = code.quantize_mxfp8(given, pad_32x=True)
    yield "mxfp8", "weight_packed", codes[:rows]
    yield "mxfp8", "weight_scale", from_blocked(as_bytes(scale), -(-rows // 32) * 32, columns // 32)[:rows]


def modelopt(given: torch.Tensor) -> Iterator[tuple[str, str, torch.Tensor]]:
    """The same of modelopt's tensor classes."""
    pytest.importorskip("modelopt.torch.quantization", reason="pip install nvidia-modelopt")
    from modelopt.torch.quantization import qtensor

    made, scale, shared = qtensor.NVFP4QTensor.quantize(given.clone(), 16)
    yield "nvfp4", "weight_packed", made._quantized_data
    yield "nvfp4", "weight_scale", scale
    yield "nvfp4", "weight_scale_2", shared
    made, scale = qtensor.MXFP8QTensor.quantize(given)
    yield "mxfp8", "weight_packed", made._quantized_data
    yield "mxfp8", "weight_scale", scale
    _, scale = qtensor.MXFP4QTensor.quantize(given, 32)  # its codes round ties down, and zeros to minus zero
    yield "mxfp4", "weight_scale", scale.reshape(len(given), -1)
    for name, axis in (("fp8-tensor", None), ("fp8", 0)):
        made, scale = qtensor.FP8QTensor.quantize(given.float(), axis=axis)
        yield name, "weight_packed", made._quantized_data
        yield name, "weight_scale", scale.reshape(() if axis is None else -1)


def torchao(given: torch.Tensor) -> Iterator[tuple[str, str, torch.Tensor]]:
    """The same of torchao, whose default for the two of the OCP is another rule."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="pip install torchao")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    for name, element in (("mxfp8", torch.float8_e4m3fn), ("mxfp4", torch.float4_e2m1fn_x2)):
        scale, codes = mx.to_mx(given.float(), element, 32, ScaleCalculationMode.RCEIL)
        yield name, "weight_packed", codes
        yield name, "weight_scale", scale
    scale, codes = nvfp4_quantize(given.float(), 16, per_tensor_amax_to_scale(given.abs().amax()))
    yield "nvfp4", "weight_packed", codes
    yield "nvfp4", "weight_scale", scale


PACKAGES: dict[str, Callable[[torch.Tensor], Any]] = {"comfy-kitchen": comfy, "modelopt": modelopt, "torchao": torchao}
DIFFERENT = {
    ("comfy-kitchen", "fp8-tensor"): 1e-4,  # multiplies by the reciprocal of the scale
    ("torchao", "nvfp4"): 0.002,  # the same
    ("modelopt", "nvfp4"): 0.02,  # divides by 6 g at once: other ties, which are frequent in bfloat16
}
"""The largest share of values that may differ, where a package computes in another order. Everything else is equal."""


@pytest.mark.parametrize("package", PACKAGES)
def test_codes_and_scales_are_those_of_other_packages(package: str) -> None:
    for dtype in DTYPES:
        given, held = weight(dtype), {}
        for name, suffix, theirs in PACKAGES[package](given):
            held[name] = held.get(name) or ours(name, given)
            mine, yours = held[name][suffix], as_bytes(theirs)
            assert (mine.dtype, mine.shape) == (yours.dtype, yours.shape), (name, suffix)
            differ = mine != yours
            if suffix == "weight_scale" and name == "nvfp4":
                differ[3, ZEROS.start // 16 : ZEROS.stop // 16] = False  # the scale of zeros may be anything
            bound = DIFFERENT.get((package, name), 0.0)
            assert differ.float().mean() <= bound, (dtype, name, suffix, int(differ.sum()))


def test_every_code_of_e2m1_and_e4m3_stands_for_its_value_and_ties_go_to_even() -> None:
    codes = torch.arange(16).to(torch.uint8)
    packed = (codes[1::2] << 4 | codes[::2])[None]
    values = E2M1.unpacked(packed, 16)
    assert values[0, :8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert torch.equal(values[0, 8:], -values[0, :8])
    assert torch.equal(E2M1.packed(values), packed)  # minus zero included
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e30])
    even = torch.tensor([0.0, 1, 1, 2, 2, 4, 4, 6, 6])
    assert torch.equal(E2M1.nearest(ties.clone()), even)
    assert torch.equal(E2M1.nearest(-ties), -even)
    assert E4M3.nearest(torch.tensor([17.0, 19.0, 1e30])).tolist() == [16, 20, 448]
    for element in (E2M1, E4M3):
        assert element.nearest(torch.tensor([torch.nan])).isnan().all()


def test_a_power_of_two_is_the_smallest_that_clips_nothing() -> None:
    """Also just above a power of two, where the logarithm in float32 is rounded."""
    for name, largest in (("mxfp8", 448.0), ("mxfp4", 6.0)):
        for exponent in (-120, -30, -1, 0, 1, 30, 100):
            exact = torch.full((1, 32), largest * 2.0**exponent)
            above = torch.nextafter(exact, torch.tensor(torch.inf)) * (1 + 2**-20)
            for given, expected in ((exact, exponent), (above, exponent + 1)):
                scale = format_named(name).quantize(given)["weight_scale"].float()
                assert scale.item() == 2.0**expected, (name, exponent)


def test_a_scale_of_nvfp4_is_two_levels() -> None:
    """By hand: the largest weight fixes the tensor's scale at 1, and the blocks have 448 and 1."""
    given = torch.zeros(2, 24)
    given[0, 0], given[0, 16:], given[1, :8] = 6 * 448.0, -6.0, torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    stored = format_named("nvfp4").quantize(given)
    assert stored["weight_scale_2"].item() == 1
    assert stored["weight_scale"].float().tolist() == [[448, 1], [1, 1]]
    assert stored["weight_packed"].tolist() == [[7, *[0] * 7, *[0xFF] * 4], [0x10, 0x32, 0x54, 0x76, *[0] * 8]]
    small = given.clone()
    small[1] *= 1e-7  # far below the smallest e4m3 number
    assert format_named("nvfp4").quantize(small)["weight_scale"].float()[1].tolist() == [2.0**-9, 1]


def test_the_scale_of_a_tensor_is_the_same_for_all_rounding_methods_and_a_weight_beyond_float32_is_refused() -> None:
    format, given = format_named("fp8-tensor"), weight(F32)
    settled = format.settled(given)
    assert settled.settled(given[:3]) is settled
    assert torch.equal(
        settled.quantize(given[:3])["weight_packed"].float(), format.quantize(given)["weight_packed"][:3].float()
    )
    with pytest.raises(FormatError, match="float32"):
        format_named("mxfp4").quantize(torch.full((1, 4), 3.3e38))
