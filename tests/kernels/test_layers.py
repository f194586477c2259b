"""A packed layer equals an ordinary layer with the dequantized weight, bit for bit, and always stays packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toy_formats import FEW

from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import (
    PackedLayer,
    pack_layer,
    quantizable_layers,
    replace_layer,
    unpack_layer,
    unsupported_layers,
)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(67, 5), (2, 3, 67)),
    "linear on rows of 64": (lambda: nn.Linear(128, 5), (3, 128)),
    "linear without bias": (lambda: nn.Linear(64, 6, bias=False), (4, 64)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(5, 4, 3, stride=2, padding=1), (2, 5, 8, 8)),
    "conv2d of 64 channels": (lambda: nn.Conv2d(64, 3, 3, padding=1), (1, 64, 4, 4)),
    "conv2d of one tap": (lambda: nn.Conv2d(9, 4, 1, bias=False), (2, 9, 4, 4)),
    "depthwise conv2d": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 6, 6)),
    "grouped conv2d": (lambda: nn.Conv2d(6, 4, 3, groups=2, dilation=2), (2, 6, 9, 9)),
    "circular conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
    "conv2d that keeps the size": (lambda: nn.Conv2d(3, 4, (1, 3), padding="same"), (2, 3, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1)), (1, 3, 2, 5, 5)),
}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]

PACKED = [format for format in FEW if format.packed]

every_layer = pytest.mark.parametrize(("make", "size"), LAYERS.values(), ids=LAYERS)
every_packed_format = pytest.mark.parametrize("format", PACKED, ids=lambda format: format.name)
Twins = dict[str, tuple[PackedLayer, nn.Module]]


@pytest.fixture(scope="module", params=LAYERS.items(), ids=lambda item: item[0])
def case(request: pytest.FixtureRequest) -> tuple[Twins, tuple[int, ...]]:
    """A kind of layer: its twins in each format that it fits, and the size of an input. Tests must not change them."""
    _, (make, size) = request.param
    fitting = [format for format in PACKED if format.fits(make().weight.shape)]
    return {format.name: twins(make, format) for format in fitting}, size


def packed(layer: nn.Module, format: Format) -> PackedLayer:
    return pack_layer(layer, format, format.quantize(layer.weight.detach()))


def twins(
    make: Callable[[], nn.Module], format: Format, dtype: torch.dtype = torch.float32
) -> tuple[PackedLayer, nn.Module]:
    """A packed layer, and an ordinary one with its dequantized weight."""
    torch.manual_seed(0)
    plain = make().to(dtype)
    layer = packed(plain, format)
    plain.weight.data.copy_(format.dequantize(format.quantize(plain.weight.data), plain.weight.shape, dtype))
    return layer, plain


def dtypes(layer: PackedLayer) -> dict[str, torch.dtype]:
    return {suffix: tensor.dtype for suffix, tensor in layer.packed_tensors().items()}


def announced(layer: PackedLayer) -> dict[str, torch.dtype]:
    specs = layer.format.tensors(layer.weight_shape, torch.float16)
    return {suffix: spec.dtype for suffix, spec in specs.items()}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_layer
def test_it_gives_the_bits_of_the_ordinary_layer(
    make: Callable[[], nn.Module], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(size).to(dtype)
    for format in PACKED:
        if format.fits(make().weight.shape):
            layer, plain = twins(make, format, dtype)
            with torch.no_grad():
                found, expected = layer(x), plain(x)
            assert torch.equal(found, expected), format.name
            assert found.stride() == expected.stride(), format.name


@every_layer
def test_it_passes_the_gradient_to_its_input(make: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    layer, plain = twins(make, format_named("int4"))
    given, expected = (torch.ones(size, requires_grad=True) for _ in range(2))
    layer(given).square().sum().backward()
    plain(expected).square().sum().backward()
    assert torch.equal(given.grad, expected.grad)


def test_its_attributes_equal_the_ordinary_layers(case: tuple[Twins, tuple[int, ...]]) -> None:
    for name, (layer, plain) in case[0].items():
        assert isinstance(layer, type(plain)), name
        assert torch.equal(layer.weight, plain.weight), name
        assert layer.weight_shape == tuple(plain.weight.shape), name
        assert layer.bias is plain.bias, name
        assert f"format={name}" in repr(layer)
        assert repr(plain)[:-1] in repr(layer)  # including its geometry


def test_only_the_packed_tensors_and_the_bias_are_in_memory(case: tuple[Twins, tuple[int, ...]]) -> None:
    for name, (layer, plain) in case[0].items():
        stored = layer.format.tensors(layer.weight_shape, torch.float16)
        names = {*stored, *(["bias"] if plain.bias is not None else [])}
        assert set(layer.state_dict()) == names, name
        assert {n for n, _ in [*layer.named_parameters(), *layer.named_buffers()]} == names, name


@pytest.mark.parametrize(
    ("move", "compute"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.float16), torch.float16),
        (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda m: m.half().float(), torch.float32),
        (lambda m: m.to("cpu"), torch.float32),
        (lambda m: m.to(memory_format=torch.channels_last), torch.float32),
        (copy.deepcopy, torch.float32),
    ],
    ids=[
        "half",
        "bfloat16",
        "double",
        "to dtype",
        "to device and dtype",
        "there and back",
        "to device",
        "strides",
        "copy",
    ],
)
def test_packed_tensors_never_change(move: Callable[[nn.Module], nn.Module], compute: torch.dtype) -> None:
    for format in PACKED:
        layer, _ = twins(lambda: nn.Conv2d(64, 4, 3), format)
        before = {suffix: tensor.clone() for suffix, tensor in layer.packed_tensors().items()}
        moved = move(nn.Sequential(layer))[0]
        assert isinstance(moved, PackedLayer), format.name
        assert dtypes(moved) == announced(moved), format.name
        assert all(torch.equal(tensor, before[suffix]) for suffix, tensor in moved.packed_tensors().items()), format
        assert moved.bias.dtype == moved.weight.dtype == moved.compute_dtype == compute, format.name
        moved(torch.randn(1, 64, 4, 4, dtype=compute))


def test_a_copy_shares_nothing() -> None:
    layer, plain = twins(lambda: nn.Linear(64, 4), format_named("int4"))
    other = copy.deepcopy(layer)
    other.set_weight(torch.zeros(4, 64))
    assert torch.equal(layer.weight, plain.weight)
    assert not other.weight.any()


@every_packed_format
def test_its_state_can_be_saved_and_loaded_as_plain_tensors(format: Format, tmp_path: Path) -> None:
    layer, _ = twins(lambda: nn.Conv2d(64, 4, 3), format)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    torch.manual_seed(1)
    other = packed(nn.Conv2d(64, 4, 3), format)
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert dtypes(other) == announced(other)
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other.bias, layer.bias)


@every_packed_format
def test_assigning_weight_data_quantizes_again(format: Format) -> None:
    for dtype in FLOATS:
        layer, _ = twins(lambda: nn.Conv2d(64, 4, 3), format, dtype)
        wanted = torch.randn(4, 64, 3, 3).to(dtype)
        layer.weight.data = wanted
        expected = format.quantize(wanted)
        assert all(torch.equal(tensor, expected[suffix]) for suffix, tensor in layer.packed_tensors().items()), dtype
        assert torch.equal(layer.weight, format.dequantize(expected, layer.weight_shape, dtype)), dtype


def test_adding_to_weight_data_quantizes_again() -> None:
    layer, plain = twins(lambda: nn.Linear(64, 4), format_named("int8"))
    delta = torch.randn(4, 64)
    layer.weight.data += delta
    torch.testing.assert_close(layer.weight.data, plain.weight.data + delta, rtol=0, atol=0.03)


def test_results_computed_from_its_weight_are_ordinary_tensors() -> None:
    layer, plain = twins(lambda: nn.Linear(64, 4), format_named("int4"))
    for derived in (layer.weight + 1, layer.weight.data, layer.weight.detach().float(), layer.weight.clone()):
        derived.data = torch.zeros(4, 64)
    assert torch.equal(layer.weight, plain.weight)


def test_a_failed_quantization_keeps_the_old_weight() -> None:
    layer, plain = twins(lambda: nn.Linear(64, 4), format_named("int4"))
    with pytest.raises(FormatError):
        layer.weight.data = torch.full((4, 64), float("nan"))
    assert torch.equal(layer.weight, plain.weight)


def test_a_weight_of_another_shape_is_refused() -> None:
    layer, plain = twins(lambda: nn.Linear(64, 4), format_named("int4"))
    with pytest.raises(ValueError, match="shape"):
        layer.set_weight(torch.zeros(3, 10))
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: nn.Linear(64, 4), (64, 8)),
        (lambda: nn.Conv1d(6, 4, 3), (6, 8, 3)),
        (lambda: nn.Conv2d(6, 4, 3), (6, 8, 3)),
        (lambda: nn.Conv3d(6, 4, 3), (6, 8, 3)),
    ],
    ids=["linear", "conv1d", "conv2d", "conv3d"],
)
def test_calling_its_class_makes_an_ordinary_layer(make: Callable[[], nn.Module], arguments: tuple[int, ...]) -> None:
    layer, plain = twins(make, format_named("int8"))
    made = type(layer)(*arguments, bias=False)
    assert type(made) is type(plain)
    assert made.weight.shape[:2] == (8, arguments[0])
    assert made.bias is None


def test_unpacking_gives_an_ordinary_layer_that_computes_the_same(case: tuple[Twins, tuple[int, ...]]) -> None:
    held, size = case
    for name, (layer, plain) in held.items():
        back = unpack_layer(layer)
        assert type(back) is type(plain), name
        assert set(back.state_dict()) == set(plain.state_dict()), name
        x = torch.randn(size)
        assert torch.equal(back(x), plain(x)), name


def test_attributes_set_by_other_libraries_are_not_copied() -> None:
    plain = nn.Conv2d(3, 4, 3)
    for change in (pack_int8, unpack_layer):
        plain.forward = lambda x: 0 * x  # as accelerate's and diffusers' hooks do
        plain._hf_hook = object()
        new = change(plain)
        assert not {"forward", "_hf_hook"} & set(vars(new))
        assert new(torch.ones(1, 3, 3, 3)).any()
        plain = new


def pack_int8(layer: nn.Module) -> PackedLayer:
    return packed(layer, format_named("int8"))


def test_a_layer_keeps_its_mode() -> None:
    assert not packed(nn.Linear(4, 4).eval(), format_named("int8")).training
    assert packed(nn.Linear(4, 4).train(), format_named("int8")).training


class Scaled(nn.Linear):
    """A subclass may compute more than the product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_only_layers_that_do_nothing_but_multiply_are_quantizable() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4),
        Scaled(4, 4),
        nn.LayerNorm(4),
        nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "up": nn.ConvTranspose2d(1, 1, 1), "table": nn.Embedding(3, 4)}),
        nn.Conv1d(1, 1, 1),
        nn.Conv3d(1, 1, 1),
    )
    assert [name for name, _ in quantizable_layers(model)] == ["0", "3.conv", "4", "5"]
    assert [name for name, _ in unsupported_layers(model)] == ["1", "3.up"]


def test_a_packed_layer_is_not_quantized_again() -> None:
    model = nn.Sequential(packed(nn.Linear(4, 4), format_named("int8")))
    assert list(quantizable_layers(model)) == []


@pytest.mark.parametrize(
    "layer", [Scaled(4, 4), nn.Embedding(4, 4), nn.ConvTranspose2d(1, 1, 1)], ids=lambda m: type(m).__name__
)
def test_an_unsupported_layer_is_refused_with_the_supported_ones(layer: nn.Module) -> None:
    with pytest.raises(FormatError, match=f"{type(layer).__name__} cannot be packed; supported are Linear, Conv1d"):
        packed(layer, format_named("int8"))


def test_a_layer_is_replaced_at_its_path() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    new = nn.Linear(2, 2)
    replace_layer(model, "1.0", new)
    assert model[1][0] is new
    assert model[0] is not new
    assert model[1][1] is not new
