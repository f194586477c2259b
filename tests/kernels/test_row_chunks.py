"""Quantizing a weight a few rows at a time, in several threads, gives the same codes as all at once."""

from __future__ import annotations

import pytest
import torch

from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.formats import row_chunks
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.quantizers.named import quantize_data_free

NAMES = ["int4", "int8", "int5-g32", "int3-channel", "int4-rot", "nf4", "fp8", "nvfp4", "mxfp4", "mxfp8", "fp8-tensor"]


@pytest.fixture
def threads() -> object:
    """Three threads during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("quantizer", ["rtn", "mse", "hqq"])
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch, name: str, quantizer: str) -> None:
    weight = torch.randn(13, 128, 3, 3, generator=torch.Generator().manual_seed(1)).half()
    format = format_named(name)
    whole = quantize_data_free(quantizer, format, weight)  # type: ignore[arg-type]
    for chunk in (1, 700, 128 * 9 * 4):
        monkeypatch.setattr(row_chunks, "_CHUNK", chunk)
        found = quantize_data_free(quantizer, format, weight)  # type: ignore[arg-type]
        assert found.keys() == whole.keys()
        as_bytes = {
            key: [each.flatten().view(torch.uint8) for each in (tensor, whole[key])] for key, tensor in found.items()
        }
        assert [key for key, (one, other) in as_bytes.items() if not torch.equal(one, other)] == [], chunk


def _note(seen: list[int], rows: slice) -> None:
    seen.extend(range(rows.start, rows.stop))


def test_every_row_is_processed_once() -> None:
    for shape in [(1, 3), (5, 2**20), (7, 2**19, 3), (4096, 1000)]:
        seen: list[int] = []
        row_chunks.each_chunk(
            lambda rows, seen=seen: seen.extend(range(rows.start, rows.stop)), shape, torch.device("cpu")
        )
        assert sorted(seen) == list(range(shape[0]))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_value_is_found_in_any_chunk(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(row_chunks, "_CHUNK", 64)
    weight = torch.randn(9, 64).half()
    weight[7, 3] = value
    with pytest.raises(FormatError, match="NaN or infinite"):
        format_named("int4").quantize(weight)
    assert torch.get_num_threads() == 3


def test_large_values_are_not_mistaken_for_infinite() -> None:
    weight = torch.full((4, 64), 3e38)
    assert torch.equal(
        format_named("int8").quantize(weight)["weight_packed"], torch.full((4, 64), 127, dtype=torch.int8)
    )
