"""Bytes are known before anything is written, and a hash identifies a denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from toy_formats import FEW

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.identity import tensor_bytes, weights_hash
from bitpolicy.policies.target import Target


class Small(nn.Module):
    """Two layers of 10 x 3 and 4 x 10 weights, 16 other floats, and integer counters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 10, bias=False)
        self.second = nn.Linear(10, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Parameter(torch.zeros(2, 2))
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(100), persistent=False)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
def test_everything_in_the_file_is_counted(storage: torch.dtype) -> None:
    account = ByteAccount.of(Target({"unet": Small()}), storage)
    assert account.shapes == {"first": (10, 3), "second": (4, 10)}
    assert account.fixed == 2 * (4 + 8 + 4) + 3 * 8
    assert account.parameters == 30 + 40 + 4 + 8 + 4
    assert account.reference == account.fixed + 2 * (30 + 40)


def test_each_layer_costs_its_codes_scales_zero_points_and_padding() -> None:
    account = ByteAccount.of(Target({"unet": Small()}), torch.float16)
    assert account.layer("first", format_named("int4")) == 10 * (2 + 2 + 1)
    assert account.layer("second", format_named("int4")) == 4 * (5 + 2 + 1)
    assert account.layer("first", format_named("int8")) == 30 + 10 * 4
    assert account.layer("first", FP16) == 60
    assert account.total({"first": format_named("int8"), "second": FP16}) == account.fixed + 70 + 80


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
def test_the_total_of_fp16_is_the_model_as_diffusers_would_store_it(toy_unet: Any, storage: torch.dtype) -> None:
    account = ByteAccount.of(Target({"unet": toy_unet}), storage)
    toy_unet.to(storage)
    assert account.reference == sum(t.numel() * t.element_size() for t in toy_unet.state_dict().values())
    assert account.reference == 2 * account.parameters


def test_the_dtype_in_memory_does_not_count(toy_unet: Any) -> None:
    before = ByteAccount.of(Target({"unet": toy_unet}), torch.float16)
    assert ByteAccount.of(Target({"unet": toy_unet.double()}), torch.float16) == before


def test_a_tied_weight_is_one_parameter() -> None:
    model = Small()
    model.copy = model.second
    account = ByteAccount.of(Target({"unet": model}), torch.float16)
    assert account.parameters == ByteAccount.of(Target({"unet": Small()}), torch.float16).parameters


@pytest.mark.parametrize("format", FEW, ids=lambda f: f.name)
def test_the_total_is_the_sum_of_the_formats_tensors(toy_unet: Any, format: Any) -> None:
    toy_unet.half()
    account = ByteAccount.of(Target({"unet": toy_unet}), torch.float16)
    formats = {name: format if format.fits(shape) else FP16 for name, shape in account.shapes.items()}
    assert format in formats.values()
    produced = 0
    for name, tensor in toy_unet.state_dict().items():
        layer = name.removesuffix(".weight")
        stored = formats[layer].quantize(tensor).values() if layer in formats else [tensor]
        produced += sum(len(tensor_bytes(t)) for t in stored)
    assert account.total(formats) == produced


def test_integers_are_stored_as_they_are() -> None:
    assert TensorSpec.stored(torch.zeros(2, dtype=torch.int64), torch.float16).nbytes == 16
    assert TensorSpec.stored(torch.zeros(2, dtype=torch.float64), torch.float16).nbytes == 4


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.int64], ids=str
)
def test_the_bytes_of_a_tensor_are_little_endian_and_in_order(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype).t()
    expected = tensor.contiguous().flatten().view(torch.uint8).tolist()
    assert list(tensor_bytes(tensor)) == expected


def test_the_bytes_of_one_and_of_no_value() -> None:
    assert bytes(tensor_bytes(torch.tensor(258, dtype=torch.int16))) == b"\x02\x01"
    assert bytes(tensor_bytes(torch.zeros(0, 3))) == b""


def test_a_hash_depends_on_the_values_and_not_on_their_layout() -> None:
    torch.manual_seed(0)
    model = Small().half()
    expected = weights_hash(model, torch.float16)
    assert weights_hash(model.float(), torch.float16) == expected
    assert weights_hash(model, torch.bfloat16) != expected


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.first.weight.data[0].mul_(1.01),
        lambda m: m.table.data.add_(1),
        lambda m: m.steps.add_(1),
        lambda m: setattr(m, "extra", nn.Linear(1, 1)),
        lambda m: setattr(m.first.weight, "data", m.first.weight.data.reshape(3, 10)),
    ],
    ids=["a weight", "a parameter", "a counter", "another layer", "a shape"],
)
def test_any_change_changes_the_hash(change: Callable[[nn.Module], None]) -> None:
    model = Small()
    before = weights_hash(model, torch.float16)
    change(model)
    assert weights_hash(model, torch.float16) != before
