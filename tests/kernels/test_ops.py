"""The product of a packed layer under gradients, autocast, compilers and copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy_products import SHAPES, bias_of, input_of, weight_of

from bitpolicy.kernels import ops
from bitpolicy.kernels.call_text import read
from bitpolicy.kernels.compute.int8 import int8_product
from bitpolicy.kernels.compute.setting import resident_bytes, set_compute
from bitpolicy.kernels.dispatch import use_kernels
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import PackedLayer, pack_layer, unpack_layer

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(67, 5), (2, 3, 67)),
    "conv1d": (lambda: nn.Conv1d(36, 4, 3, padding=1), (2, 36, 9)),
    "conv2d": (lambda: nn.Conv2d(40, 6, 3, stride=2, padding=1), (2, 40, 8, 8)),
    "conv2d 1x1": (lambda: nn.Conv2d(64, 6, 1, bias=False), (2, 64, 4, 4)),
    "circular conv2d": (lambda: nn.Conv2d(33, 4, 3, padding=1, padding_mode="circular"), (2, 33, 6, 6)),
    "uneven conv2d": (lambda: nn.Conv2d(33, 4, (1, 2), padding="same"), (2, 33, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(12, 4, (1, 3, 3), padding=(0, 1, 1)), (1, 12, 2, 5, 5)),
}
every_layer = pytest.mark.parametrize(("make", "size"), LAYERS.values(), ids=LAYERS)
every_layer_that_the_operator_pads = pytest.mark.parametrize(
    ("make", "size"),
    [
        pytest.param(make, size, id=about)
        for about, (make, size) in LAYERS.items()
        if getattr(make(), "padding_mode", "zeros") == "zeros" and not isinstance(getattr(make(), "padding", 0), str)
    ],
)
every_compute = pytest.mark.parametrize("compute", ["exact", "int8", "fp8"])


@pytest.fixture(autouse=True)
def no_compiled_code_remains() -> Iterator[None]:
    yield
    torch.compiler.reset()


def packed(make: Callable[[], nn.Module], compute: str = "int8", format: str | None = None) -> PackedLayer:
    torch.manual_seed(0)
    layer, found = make(), format_named(format or ("fp8" if compute == "fp8" else "int4"))
    result = pack_layer(layer, found, found.quantize(layer.weight.detach()))
    result.compute = Compute(compute)
    return result


def close(found: torch.Tensor, right: torch.Tensor, bound: float = 1e-5) -> bool:
    return bool((found - right).norm() <= bound * right.norm()) and found.stride() == right.stride()


@every_layer
def test_8_bit_compute_rounds_the_padded_input(make: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    """The packed layer must add what an ordinary layer does: padding, and inputs without a batch."""
    layer, x = packed(make), torch.randn(size)
    exact = unpack_layer(layer)(x)
    found = layer(x)
    assert found.shape == exact.shape
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.05
    if not isinstance(layer, nn.Linear):
        assert torch.equal(layer(x[0]), layer(x[:1])[0])
        if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            assert close(found, int8_product(x, layer.held(), layer.bias))


@every_layer
@every_compute
def test_it_has_the_gradient_of_the_dequantized_layer(
    make: Callable[[], nn.Module], size: tuple[int, ...], compute: str
) -> None:
    layer = packed(make, compute)
    plain = unpack_layer(layer)
    towards = torch.randn_like(plain(torch.randn(size)))
    gradients = []
    for module in (layer, plain):
        x = torch.ones(size, requires_grad=True)
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach().clone())
        (module(x) * towards).sum().backward()
        gradients.append((x.grad, None if module.bias is None else module.bias.grad))
    (x, bias), (right_x, right_bias) = gradients
    assert close(x, right_x)
    assert bias is None or close(bias, right_bias)


@every_layer_that_the_operator_pads
@pytest.mark.parametrize("compute", ["int8", "fp8"])
def test_the_operator_passes_torchs_checks(make: Callable[[], nn.Module], size: tuple[int, ...], compute: str) -> None:
    layer = packed(make, compute)
    x = torch.randn(size, requires_grad=True)
    arguments = ops.arguments(x, layer.held(), layer.bias, Compute(compute))
    schema = ["test_schema"] if compute == "int8" else []  # torch's schema check cannot sum float8
    checks = [*schema, "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    results = torch.library.opcheck(ops._product, arguments, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("shape", ["linear of odd sizes", "conv2d 3x3 with stride", "conv1d", "conv3d"])
@pytest.mark.parametrize(("compute", "format"), [(Compute.INT8, "int4"), (Compute.FP8, "fp8")])
def test_the_fake_kernel_gives_shape_and_strides(shape: str, compute: Compute, format: str) -> None:
    x, weight = input_of(shape), weight_of(shape, format)
    assert weight is not None
    for arranged in (x, x.contiguous(memory_format=torch.channels_last)) if x.ndim == 4 else (x,):
        arguments = ops.arguments(arranged, weight, bias_of(shape), compute)
        found, fake = ops._product(*arguments), ops._shape_of_product(*arguments)
        assert (found.shape, found.stride(), found.dtype) == (fake.shape, fake.stride(), fake.dtype), arranged.stride()


@every_layer
@every_compute
def test_it_compiles_to_one_graph(make: Callable[[], nn.Module], size: tuple[int, ...], compute: str) -> None:
    layer, x = packed(make, compute), torch.randn(size)
    with torch.no_grad():
        found, right = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    assert torch.equal(found, right) if compute == "exact" else close(found, right)


def test_the_default_compiler_gives_the_bits_of_exact_products() -> None:
    """A past bug: the compiler fused the dequantization of rows with a partial group, and read past their end."""
    formats = ("int4", "int4-g32-sym", "nf4", "int3", "int8")
    layers = [packed(lambda: nn.Linear(152, 152), "exact", format) for format in formats]
    layers += [packed(lambda: nn.Conv1d(152, 152, 1), "exact", "int4")]
    model, x = nn.Sequential(*layers), torch.randn(2, 152, 152)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))


@every_compute
def test_autocast_decides_the_dtype_when_compiled(compute: str) -> None:
    make, size = LAYERS["conv2d"]
    layer, x = packed(make, compute), torch.randn(size)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, right = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    assert found.dtype == right.dtype == torch.bfloat16
    assert torch.equal(found, right) if compute == "exact" else close(found.float(), right.float())


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@every_compute
def test_it_exports_with_a_dynamic_batch_size(name: str, compute: str) -> None:
    make, size = LAYERS[name]
    layer = packed(make, compute)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(layer, (torch.randn(size),), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(5, *size[1:])
    with torch.no_grad():
        assert close(program(x), layer(x))


@every_layer
@every_compute
def test_autocast_decides_the_dtype(make: Callable[[], nn.Module], size: tuple[int, ...], compute: str) -> None:
    layer, x = packed(make, compute), torch.randn(size)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, right = layer(x), unpack_layer(layer)(x)
    assert found.dtype == right.dtype == torch.bfloat16
    assert (found - right).float().norm() <= 0.05 * right.float().norm()


@every_compute
def test_modes_that_watch_operators_see_the_product(compute: str) -> None:
    layer, plain, x = packed(LAYERS["conv2d"][0], compute), LAYERS["conv2d"][0](), torch.randn(LAYERS["conv2d"][1])
    with torch.no_grad(), FlopCounterMode(display=False) as right:
        plain(x)
    with torch.no_grad(), FlopCounterMode(display=False) as found:
        y = layer(x)
    assert y.shape == plain(x).shape
    assert compute != "exact" or found.get_total_flops() == right.get_total_flops()


def test_it_can_be_mapped_over_a_batch() -> None:
    layer, x = packed(LAYERS["linear"][0], "exact"), torch.randn(4, 2, 67)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


@every_layer
def test_low_memory_gives_the_same_result(make: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    layer, x = packed(make), torch.randn(size)
    with torch.no_grad():
        right = layer(x)
        layer.low_memory = True
        assert close(layer(x), right)


def test_set_compute_applies_to_the_whole_model() -> None:
    model = nn.Sequential(
        packed(LAYERS["linear"][0], "exact"), nn.Linear(2, 2), packed(lambda: nn.Conv2d(6, 6, 3, groups=6))
    )
    assert set_compute(model, "int8") == ["0"]  # depthwise layers stay exact
    assert [layer.compute for layer in (model[0], model[2])] == [Compute.INT8] * 2
    assert model[0].effective_compute is Compute.INT8
    assert set_compute(model, "exact", low_memory=True) == []
    assert model[0].low_memory


def test_under_fp8_layers_in_other_formats_compute_as_float() -> None:
    make = LAYERS["linear"][0]
    short = packed(lambda: nn.Linear(9, 5), "exact", "fp8")
    model = nn.Sequential(packed(make, "fp8"), packed(make, "exact", "int8"), short)
    assert set_compute(model, "fp8") == ["0"]
    assert [layer.effective_compute for layer in model] == [Compute.FP8, Compute.FLOAT, Compute.FLOAT]


def test_set_compute_applies_to_every_model_of_a_pipeline() -> None:
    pipe = SimpleNamespace(components={"unet": nn.Sequential(packed(LAYERS["linear"][0])), "scheduler": object()})
    assert set_compute(pipe, "int8") == ["unet.0"]


def test_a_model_without_packed_layers_is_refused() -> None:
    with pytest.raises(BitPolicyError, match="Linear has no packed layers"):
        set_compute(nn.Linear(2, 2), "int8")


def test_a_copy_gives_the_same_result() -> None:
    layer, x = packed(LAYERS["conv2d"][0]), torch.randn(LAYERS["conv2d"][1])
    other = copy.deepcopy(layer)
    assert other.compute is Compute.INT8
    assert torch.equal(other(x), layer(x))
    other.set_weight(torch.zeros(other.weight_shape))
    assert not torch.equal(other(x), layer(x))
    assert torch.equal(other(x), other.bias.view(1, -1, 1, 1).expand(2, -1, 4, 4))


def test_a_new_weight_takes_effect_at_once() -> None:
    layer, x = packed(LAYERS["linear"][0]), torch.randn(2, 67)
    before = layer(x)
    layer.set_weight(2 * layer.weight)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias), rtol=0.05, atol=0.02)
    layer.load_state_dict({**layer.state_dict(), "weight_scale": torch.zeros_like(layer.weight_scale)})
    assert torch.equal(layer(x), layer.bias.expand(2, -1))


def test_stored_bytes_are_the_bytes_of_the_tensors() -> None:
    model = nn.Sequential(packed(LAYERS["linear"][0], "exact"), packed(LAYERS["conv2d"][0], "exact"))
    with use_kernels("reference"), torch.no_grad():
        model[0](torch.randn(2, 67))
    found = resident_bytes(model)
    assert found.stored == sum(t.nbytes for t in model.state_dict().values())
    assert found.layouts == 0


@pytest.mark.parametrize("shape", ["linear of odd sizes", "conv2d 3x3", "conv3d"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_operator_arguments_round_trip(shape: str, low_memory: bool) -> None:
    weight: Any = weight_of(shape, "int6-channel-sym")
    x, tensors, _, call = ops.arguments(input_of(shape), replace(weight, low_memory=low_memory), None, Compute.INT8)
    again = read(call).holding(tensors)
    assert (again.format, again.shape, again.geometry, again.low_memory) == (
        weight.format,
        SHAPES[shape].weight,
        SHAPES[shape].geometry,
        low_memory,
    )
    assert list(again.tensors) == list(weight.tensors)
    assert again.kind == replace(weight, low_memory=low_memory).kind
    assert (x.shape, read(call).compute) == (SHAPES[shape].input, Compute.INT8)
