"""The choice of formats worth a probe, against a hull found by comparing every pair of formats."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16, all_formats, format_named, parse_formats
from bitpolicy.sensitivity.rounding.candidates import Candidate, candidates, useful_formats

F16 = torch.float16
WIDTHS = range(2, 9)


def bits(format: Format) -> int:
    return int(format.parameters()["bits"])


@pytest.fixture(scope="module")
def survivors(new_toy_unet: Any) -> tuple[Format, ...]:
    return useful_formats(new_toy_unet(), all_formats(), F16)


def test_candidates_pair_every_packed_format_with_every_quantizer() -> None:
    int4, int8 = format_named("int4"), format_named("int8")
    found = candidates([int4, FP16, int8], ("rtn", "mse"))
    assert found == (Candidate(int4), Candidate(int4, "mse"), Candidate(int8), Candidate(int8, "mse"))
    assert candidates([FP16]) == ()


@pytest.mark.parametrize("names", ["int4,int8", "fp16", "int2,int3,int4,int5,int6,int7,int8,nf4,fp8", "int4,int4-g32"])
def test_a_short_list_of_formats_is_kept_unchanged(toy_unet: Any, names: str) -> None:
    formats = parse_formats(names)
    assert useful_formats(toy_unet, formats, F16) == formats


def test_sixteen_packed_formats_and_fp16_are_still_a_short_list(toy_unet: Any) -> None:
    sixteen = (*all_formats()[:16], FP16)
    assert useful_formats(toy_unet, sixteen, F16) == sixteen
    assert len(useful_formats(toy_unet, (*all_formats()[:17], FP16), F16)) < 17


def test_one_or_two_formats_of_each_width_survive(survivors: tuple[Format, ...]) -> None:
    counts = {width: sum(bits(format) == width for format in survivors) for width in WIDTHS}
    assert set(counts.values()) <= {1, 2}
    assert survivors[-1] is FP16
    assert len(survivors) == len(set(survivors)) == sum(counts.values()) + 1
    assert set(survivors) <= set(all_formats())


def test_narrow_formats_come_first(survivors: tuple[Format, ...]) -> None:
    widths = [bits(format) for format in survivors]
    assert widths == sorted(widths)


def test_the_same_formats_survive_every_time(new_toy_unet: Any) -> None:
    first, second = (useful_formats(new_toy_unet().mid_block, all_formats(), F16) for _ in range(2))
    assert first == second


def points(weight: torch.Tensor) -> dict[Format, tuple[int, float]]:
    """(bytes, squared error) of one layer in every format that fits it."""
    found = {}
    for format in all_formats():
        if format.fits(weight.shape):
            back = format.dequantize(format.quantize(weight), weight.shape, torch.float32)
            error = float((back.double() - weight.double()).square().sum()) if format.packed else 0.0
            found[format] = (format.nbytes(weight.shape, weight.dtype), error)
    return found


def on_the_hull(weight: torch.Tensor) -> set[Format]:
    """Formats that no other format, and no mixture of two others, matches in both bytes and error."""
    every = points(weight)

    def beaten(format: Format) -> bool:
        size, error = every[format]
        others = {point for point in every.values() if point != (size, error)}
        if any(other <= size and harm <= error for other, harm in others):
            return True
        for (small, worse), (large, better) in itertools.product(others, others):
            if small < size < large:
                share = (large - size) / (large - small)
                if share * worse + (1 - share) * better <= error:
                    return True
        return False

    return {format for format in every if not beaten(format)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(256, 24),
        lambda: nn.Linear(65, 8),  # no rotated format fits
        lambda: nn.Conv2d(32, 16, 3),
        lambda: nn.Conv1d(5, 6, 3),
    ],
    ids=["linear", "odd linear", "conv2d", "conv1d"],
)
@pytest.mark.parametrize("outliers", [False, True])
def test_formats_that_survive_for_one_layer_are_on_the_hull_of_bytes_against_error(make: Any, outliers: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(make())
    if outliers:
        model[0].weight.data.view(-1)[::97] *= 12
    weight = model[0].weight.detach().half()
    hull, every = on_the_hull(weight), points(weight)
    found = useful_formats(model, all_formats(), F16)
    assert set(found) <= hull
    for width in WIDTHS:  # two of each width, or as many as the hull has; equal points count once
        there = {every[format] for format in hull if bits(format) == width}
        assert sum(bits(f) == width for f in found) == min(2, len(there))


def test_the_layers_with_the_most_weights_decide() -> None:
    """One large layer with outliers outvotes small layers without outliers."""
    torch.manual_seed(2)
    large = nn.Linear(512, 32)
    large.weight.data.view(-1)[::61] *= 20
    small = [nn.Linear(64, 4) for _ in range(3)]
    alone = useful_formats(nn.Sequential(large), all_formats(), F16)
    together = useful_formats(nn.Sequential(*small, large), all_formats(), F16)
    assert set(alone) <= set(together)


def test_a_large_layer_is_judged_by_some_of_its_rows() -> None:
    torch.manual_seed(3)
    layer = nn.Linear(128, 32)
    twice = nn.Linear(128, 64)
    twice.weight.data = layer.weight.data.repeat_interleave(2, 0)  # rows 0, 2.03, 4.06, ... are those of `layer`
    assert useful_formats(nn.Sequential(twice), all_formats(), F16) == useful_formats(
        nn.Sequential(layer), all_formats(), F16
    )
