"""A packed layer's cache is never out of date: the next call sees any change of the layer."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bitpolicy.kernels import dispatch
from bitpolicy.kernels.compute.setting import set_compute
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Compute, Geometry, PackedWeight
from bitpolicy.kernels.layers import PackedLayer, pack_layer, unpack_layer
from bitpolicy.kernels.ops import product

MAKE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 5), (2, 64)),
    "conv2d": (lambda: nn.Conv2d(36, 6, 3, padding=1), (2, 36, 6, 6)),
}
every_layer = pytest.mark.parametrize(("make", "size"), MAKE.values(), ids=MAKE)
every_compute = pytest.mark.parametrize("compute", ["exact", "float", "int8"])


def called(make: Callable[[], nn.Module], size: tuple[int, ...], compute: str = "exact") -> tuple[Any, torch.Tensor]:
    """A layer that has been called, and its input."""
    torch.manual_seed(0)
    layer, format, x = make(), format_named("int4"), torch.randn(size)
    packed: Any = pack_layer(layer, format, format.quantize(layer.weight.detach()))
    packed.compute = Compute(compute)
    with torch.no_grad():
        packed(x)
    return packed, x


@torch.no_grad()
def assert_new(layer: PackedLayer, x: torch.Tensor) -> None:
    """The layer computes like one without a cache."""
    right = product(x, PackedWeight(**vars_of(layer)), layer.bias, layer.compute)
    assert torch.equal(layer(x), right)


def vars_of(layer: Any) -> dict[str, Any]:
    slides = None
    if not isinstance(layer, nn.Linear):
        slides = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
    tensors = layer.packed_tensors()
    return {"format": layer.format, "shape": layer.weight_shape, "tensors": tensors, "geometry": slides}


@every_layer
@every_compute
def test_a_replaced_buffer_takes_effect(make: Any, size: tuple[int, ...], compute: str) -> None:
    """As when accelerate moves a layer without calling its methods."""
    layer, x = called(make, size, compute)
    before = layer(x)
    for suffix in layer.packed_tensors():
        layer._buffers[suffix] = layer._buffers[suffix].flip(0)
        assert_new(layer, x)
    assert not torch.equal(layer(x), before)


@every_layer
@every_compute
def test_an_edited_buffer_takes_effect(make: Any, size: tuple[int, ...], compute: str) -> None:
    layer, x = called(make, size, compute)
    before = layer(x)
    layer.weight_scale.mul_(2)
    assert_new(layer, x)
    assert not torch.equal(layer(x), before)


@every_compute
def test_a_shallow_copy_uses_its_own_buffers(compute: str) -> None:
    """As torch's DataParallel makes replicas."""
    layer, x = called(*MAKE["linear"], compute)
    replica = copy.copy(layer)
    replica.__dict__ = layer.__dict__.copy()
    replica._buffers = {name: tensor.flip(0) for name, tensor in layer._buffers.items()}
    assert_new(replica, x)
    assert not torch.equal(replica(x), layer(x))


def test_changed_geometry_takes_effect_at_once() -> None:
    layer, x = called(*MAKE["conv2d"])
    for name, value in {"stride": (2, 1), "dilation": (1, 2)}.items():
        setattr(layer, name, value)
        assert_new(layer, x)
    layer.padding_mode = "circular"
    assert torch.equal(layer(x), unpack_layer(layer)(x))


def test_changed_settings_take_effect_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = called(*MAKE["linear"])
    set_compute(layer, "int8")
    rounded = layer(x)
    assert not torch.equal(rounded, unpack_layer(layer)(x))
    set_compute(layer, None, low_memory=True)
    assert layer.held().low_memory
    asked: list[str] = []
    decide = dispatch._decide
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_decide", lambda mode, *rest: asked.append(mode) or decide(mode, *rest))
    for value in ("reference", "cpu-int8", "", "reference"):
        monkeypatch.setenv("BITPOLICY_KERNELS", value)
        layer(x)
    monkeypatch.delenv("BITPOLICY_KERNELS")
    layer(x)
    with dispatch.use_kernels("onednn-int8"):
        layer(x)
    assert asked == ["reference", "cpu-int8", "auto", "onednn-int8"]


@every_layer
def test_the_cache_is_kept_but_not_copied(make: Any, size: tuple[int, ...]) -> None:
    layer, x = called(make, size)
    kept = layer.held()
    layer(x)
    assert layer.held() is kept
    other = copy.deepcopy(layer)
    assert set(vars(layer)) - set(vars(other)) == set(vars(layer)) - set(layer.__getstate__()) == {"_kept_weight"}
    assert other.held() is not kept
    other.weight_scale.zero_()
    assert_new(other, x)
    assert_new(layer, x)


@every_compute
def test_it_keeps_no_tensor_alive(compute: str) -> None:
    """Otherwise a layer that was moved away would stay in memory."""
    layer, _ = called(*MAKE["linear"], compute)
    gc.collect()
    before = len(dispatch._layouts)
    old = [weakref.ref(tensor) for tensor in layer.packed_tensors().values()]
    for suffix in layer.packed_tensors():
        layer._buffers[suffix] = layer._buffers[suffix].to("meta")
    gc.collect()
    assert [tensor() for tensor in old] == [None] * len(old)
    assert len(dispatch._layouts) == before - (compute == "int8")


def test_a_foreign_buffer_is_not_part_of_the_weight() -> None:
    layer, x = called(*MAKE["linear"])
    layer.register_buffer("calls", torch.zeros(1))
    assert list(layer.held().tensors) == ["weight_packed", "weight_scale", "weight_zero"]
    assert_new(layer, x)


def test_weights_that_differ_only_in_tensors_have_the_same_kind() -> None:
    weight, other = called(*MAKE["conv2d"])[0].held(), called(*MAKE["conv2d"])[0].held()
    assert weight is not other
    assert weight.kind == other.kind
    slower = Geometry((2, 2), (1, 1), (1, 1))
    changes: tuple[dict[str, Any], ...] = (
        {"format": format_named("int4-g32")},
        {"shape": (6, 36, 3, 2)},
        {"geometry": slower},
        {"low_memory": True},
    )
    assert len({weight.kind, *(replace(weight, **change).kind for change in changes)}) == 5
