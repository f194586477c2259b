"""A compiled model keeps as much of its packed layers as an eager one, and frees it as early."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitpolicy.kernels import dispatch, ops
from bitpolicy.kernels.compute.int8 import int8_product
from bitpolicy.kernels.dispatch import Row
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Compute, Kernel, PackedWeight, Prepared
from bitpolicy.kernels.layers import PackedLayer, pack_layer

both = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
every_compute = pytest.mark.parametrize("compute", ["exact", "int8"])


class _Keeping(Kernel):
    """A kernel for the definition of INT8 that makes a layout of the weight and counts how often."""

    name = "keeping"
    compute = Compute.INT8
    settled = True
    made: ClassVar[list[int]] = []

    def refuses(self, x: torch.Tensor, weight: PackedWeight) -> str | None:
        return None

    def prepare(self, weight: PackedWeight, dtype: torch.dtype) -> Prepared:
        self.made.append(id(weight.tensors["weight_packed"]))
        return {name: tensor.clone() for name, tensor in weight.tensors.items()}

    def __call__(self, x: torch.Tensor, weight: PackedWeight, bias: Any, prepared: Prepared) -> torch.Tensor:
        return int8_product(x, weight.holding(prepared), bias)


@pytest.fixture(autouse=True)
def no_caches_remain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "TABLE", (Row("cpu", "linear conv2d", "*", _Keeping()), *dispatch.TABLE))
    monkeypatch.setattr(dispatch, "_chosen", {})
    _Keeping.made.clear()
    yield
    torch.compiler.reset()


def model_of(compute: str = "int8") -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    layers: list[Any] = [nn.Conv2d(36, 40, 3, padding=1), nn.SiLU(), nn.Conv2d(40, 35, 1), nn.Linear(5, 67)]
    return nn.Sequential(*(packed(each, compute) for each in layers)), torch.randn(2, 36, 4, 5)


def packed(layer: Any, compute: str) -> nn.Module:
    if isinstance(layer, nn.SiLU):
        return layer
    format = format_named("int4")
    found = pack_layer(layer, format, format.quantize(layer.weight.detach()))
    found.compute = Compute(compute)
    return found


def stored(model: nn.Module) -> list[tuple[PackedLayer, str]]:
    return [(layer, suffix) for layer in model if isinstance(layer, PackedLayer) for suffix in layer.packed_tensors()]


@both
@pytest.mark.parametrize("grad", [False, True], ids=["no gradient", "a gradient"])
def test_a_layout_is_made_once_for_all_calls(backend: str, grad: bool) -> None:
    model, x = model_of()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(grad):
        found = [compiled(x.clone().requires_grad_(grad)) for _ in range(3)]
    packed_of = [id(layer._buffers["weight_packed"]) for layer in (model[0], model[2])]
    assert _Keeping.made == packed_of  # the linear layer has short rows, so it stays exact
    with torch.no_grad():
        model(x)  # reuses what the compiled one made
    assert _Keeping.made == packed_of
    assert all(torch.equal(found[0], other) for other in found)


@both
@every_compute
def test_replaced_or_edited_tensors_take_effect_at_once(backend: str, compute: str) -> None:
    model, x = model_of(compute)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        seen = [compiled(x)]
        for layer, suffix in stored(model):
            layer._buffers[suffix] = layer._buffers[suffix].flip(0)  # type: ignore[union-attr]
        seen.append(compiled(x))
        assert torch.equal(seen[1], copy.deepcopy(model)(x))
        for layer, suffix in stored(model):
            if suffix == "weight_scale":
                layer._buffers[suffix].mul_(2)  # type: ignore[union-attr]
        seen.append(compiled(x))
        assert torch.equal(seen[2], copy.deepcopy(model)(x))
        model[0].set_weight(torch.ones(model[0].weight_shape))
        seen.append(compiled(x))
        assert torch.equal(seen[3], copy.deepcopy(model)(x))
    assert not any(torch.equal(one, other) for one, other in pairwise(seen))


@both
def test_layouts_are_freed_with_the_model(backend: str) -> None:
    gc.collect()
    before = len(dispatch._layouts)
    model, x = model_of()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        compiled(x)
    assert len(dispatch._layouts) == before + 2
    tensors = [weakref.ref(layer._buffers[suffix]) for layer, suffix in stored(model)]  # type: ignore[arg-type]
    del model, compiled
    torch.compiler.reset()
    gc.collect()
    assert [tensor() for tensor in tensors] == [None] * len(tensors)
    assert len(dispatch._layouts) == before


@both
def test_a_layout_is_freed_with_replaced_tensors(backend: str) -> None:
    """A compiled model keeps none of them. A new tensor at a freed one's address is another weight."""
    model, x = model_of()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        compiled(x)
        gc.collect()
        before = len(dispatch._layouts)
        for _ in range(3):
            for layer, suffix in stored(model):
                layer._buffers[suffix] = layer._buffers[suffix].roll(1, 0)  # type: ignore[union-attr]
            assert torch.equal(compiled(x), copy.deepcopy(model)(x))
            gc.collect()
            assert len(dispatch._layouts) == before


class _Watching(TorchDispatchMode):
    """Records every operator, and the arguments of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func, args[3] if func is ops._product else None))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True], ids=["no gradient", "a gradient"])
def test_modes_that_watch_operators_see_one(grad: bool) -> None:
    """Only the product is seen, not its internals, although the autograd kernel bypasses the dispatcher."""
    layer, x = model_of()[0][0], torch.randn(1, 36, 4, 5)
    with torch.set_grad_enabled(grad), _Watching() as watching:
        found = layer(x.requires_grad_(grad))
    assert (ops._product, "int4 40x36x3x3 int8 stride=1x1 padding=1x1 dilation=1x1 groups=1") in watching.seen
    assert torch.ops.aten.amax.default not in [func for func, _ in watching.seen]
    assert found.requires_grad == grad


def test_no_graph_is_recorded_without_gradients() -> None:
    layer, x = model_of()[0][0], torch.randn(1, 36, 4, 5, requires_grad=True)
    arguments = ops.arguments(x, layer.held(), layer.bias, Compute.INT8)
    with torch.no_grad():
        assert not ops._product(*arguments).requires_grad
    with torch.inference_mode():
        assert not ops._product(*arguments).requires_grad
    x, bias = x.detach(), layer.bias.detach()
    assert not ops._product(x, *arguments[1:2], bias, arguments[3]).requires_grad
    assert ops._product(x, *arguments[1:]).requires_grad  # for the bias


@both
def test_a_compiled_model_has_the_gradients_of_the_eager_model(backend: str) -> None:
    model, x = model_of()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    gradients = []
    for call in (compiled, model):
        own = x.clone().requires_grad_()
        bias = model[0].bias = nn.Parameter(model[0].bias.detach().clone())
        call(own).square().sum().backward()
        gradients.append((own.grad, bias.grad))
    for found, right in zip(*gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_an_exported_program_can_be_saved_and_loaded() -> None:
    model, x = model_of()
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.export.load(file).module()(x), model(x))
