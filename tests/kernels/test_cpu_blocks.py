"""Products in blocks of output channels: torch's bits with little memory, and used only if both hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from toy_formats import PACKED, WITHOUT_CPP

from bitpolicy import kernel_choices
from bitpolicy.kernels import dispatch, micro_probe
from bitpolicy.kernels.compute.reference import Reference
from bitpolicy.kernels.cpu.blocks import CpuBlocks
from bitpolicy.kernels.cpu.exact import CpuDequantize
from bitpolicy.kernels.cpu.scratch import release_scratch, scratch_bytes
from bitpolicy.kernels.dispatch import choose
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Compute, Geometry, PackedWeight
from bitpolicy.policies.footprint import most_allocated

pytestmark = pytest.mark.usefixtures("cpp_kernels")


@dataclass(frozen=True)
class Layer:
    """An input and a weight. Convolutions have stride `stride` and padding one."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1

    def packed(self, format: Format | str) -> PackedWeight:
        known = format_named(format) if isinstance(format, str) else format
        drawn = torch.randn(self.weight, generator=torch.Generator().manual_seed(0))
        n = len(self.weight) - 2
        geometry = Geometry((self.stride,) * n, (1,) * n, (1,) * n) if n else None
        return PackedWeight(known, self.weight, known.quantize(drawn), geometry)

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.input, generator=generator).to(dtype), torch.randn(self.weight[0]).to(dtype)


SMALL = CpuBlocks(least=0, block=1)  # blocks of 64 channels, whatever their size
LAYERS = {
    "linear": Layer((5, 96), (192, 96)),
    "linear of one row": Layer((1, 128), (320, 128)),
    "linear of three dimensions": Layer((2, 7, 64), (128, 64)),
    "conv1d": Layer((2, 48, 11), (128, 48, 3)),
    "conv2d": Layer((1, 64, 8, 8), (192, 64, 3, 3)),
    "conv2d of a batch, with stride": Layer((3, 32, 9, 8), (128, 32, 3, 3), 2),
    "conv3d": Layer((1, 16, 3, 5, 4), (128, 16, 3, 3, 3)),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_blocks_give_the_bits_of_the_whole_product(layer: Layer, dtype: torch.dtype) -> None:
    x, bias = layer.inputs(dtype)
    for format in ("int4", "int8"):
        for b in (bias, None):
            weight = layer.packed(format)
            assert SMALL.refuses(x, weight) is None
            found, right = SMALL(x, weight, b, {}), Reference()(x, weight, b, {})
            assert torch.equal(found, right)
            assert (found.dtype, found.stride()) == (right.dtype, right.stride())


@pytest.mark.parametrize(
    "format",
    [f for f in PACKED if f.fits(LAYERS["conv2d"].weight) and f.name not in WITHOUT_CPP],
    ids=lambda format: format.name,
)
def test_every_format_can_be_split_between_output_channels(format: Format) -> None:
    layer = LAYERS["conv2d"]
    x, bias = layer.inputs()
    weight = layer.packed(format)
    assert SMALL.refuses(x, weight) is None
    assert torch.equal(SMALL(x, weight, bias, {}), Reference()(x, weight, bias, {}))


def test_only_one_block_is_dequantized_at_a_time() -> None:
    layer = Layer((1, 2048), (2048, 2048))
    (x, bias), weight = layer.inputs(), layer.packed("int4")
    kernel = CpuBlocks(block=2**20)
    release_scratch()
    kernel(x, weight, bias, {})
    assert scratch_bytes() == kernel.scratch(weight, x.dtype) == 2**20
    most = most_allocated(x.device, lambda: kernel(x, weight, bias, {}))
    assert most < 1.1 * 2**20 < CpuDequantize().scratch(weight, x.dtype) / 10


def test_gradients_pass_through() -> None:
    layer = LAYERS["conv2d"]
    (x, bias), weight = layer.inputs(), layer.packed("int4")
    gradients = []
    for kernel in (SMALL, Reference()):
        at = x.clone().requires_grad_()
        kernel(at, weight, bias, {}).square().sum().backward()
        gradients.append(at.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("input", "weight", "why"),
    [
        ((1, 512), (512, 512), "8 MiB"),
        ((1, 2048), (2050, 2048), "multiples of 64"),
        ((1, 64 * 1024), (64, 64 * 1024), "one block"),
    ],
)
def test_weights_that_gain_nothing_from_blocks_are_refused(
    input: tuple[int, ...], weight: tuple[int, ...], why: str
) -> None:
    layer = Layer(input, weight)
    assert why in str(CpuBlocks().refuses(layer.inputs()[0], layer.packed("int8")))


def test_groups_and_channels_last_are_refused() -> None:
    layer = LAYERS["conv2d"]
    (x, _), weight = layer.inputs(), layer.packed("int8")
    last = x.contiguous(memory_format=torch.channels_last)
    pixel = x[..., :1, :1].contiguous()  # contiguous in either order; torch goes by the strides
    for found in (last, pixel, pixel.as_strided(pixel.shape, (64, 1, 64, 64))):
        assert "channels-last" in (SMALL.refuses(found, weight) or "")
    grouped = PackedWeight(weight.format, weight.shape, weight.tensors, Geometry((1, 1), (1, 1), (1, 1), 2))
    assert "grouped" in (SMALL.refuses(torch.cat([x, x], 1), grouped) or "")


class OffByABit(CpuBlocks):
    def __call__(self, *args: Any) -> torch.Tensor:
        return torch.nextafter(super().__call__(*args), torch.tensor(torch.inf))


@pytest.mark.parametrize(
    ("kernel", "slower", "chosen"),
    [
        (SMALL, 1.04, "cpu-blocks"),
        (SMALL, 1.06, "cpu-dequantize"),
        (SMALL, 0.5, "cpu-blocks"),
        (OffByABit(least=0, block=1), 0.5, "cpu-dequantize"),
    ],
)
def test_it_is_chosen_if_correct_and_about_as_fast(
    kernel: CpuBlocks, slower: float, chosen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("BITPOLICY_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "_chosen", {})
    micro_probe.forget()
    rows = [row for row in dispatch.TABLE if row.kernel.name in ("cpu-dequantize", "reference")]
    first = next(row for row in dispatch.TABLE if row.kernel.name == "cpu-blocks")
    table = (dispatch.Row(first.device, first.layers, first.formats, kernel), *rows)
    monkeypatch.setattr(dispatch, "TABLE", table)
    seconds = {"Blocks": slower, "OffByABit": slower, "CpuDequantize": 1.0}

    def timed(multiply: Any, _: torch.device) -> float:
        return next((s for name, s in seconds.items() if name in type(multiply.args[0]).__name__), 3.0)

    monkeypatch.setattr(micro_probe, "_seconds", timed)
    layer = LAYERS["linear"]
    (x, bias), weight = layer.inputs(), layer.packed("int4")
    found = choose(x, weight, bias, Compute.EXACT)
    assert found.name == chosen
    why = kernel_choices._why(found, x, weight, bias, Compute.EXACT)
    assert ("needs less memory" in why) == (chosen == "cpu-blocks" and slower > 1)
    assert scratch_bytes() == 0  # memory reserved while timing is released
    micro_probe.forget()


def test_reserved_scratch_is_counted_for_the_whole_weight() -> None:
    """The first call times both kernels."""
    weight = Layer((1, 2048), (2048, 2048)).packed("int8")
    assert dispatch.scratch_kept(weight, torch.float32) == 4 * 2048 * 2048
