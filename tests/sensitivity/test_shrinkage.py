"""Shrinkage of the scores of one layer's formats towards each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitpolicy.kernels.formats.named import parse_formats
from bitpolicy.sensitivity.sketches.shrinkage import can_shrink, kept_share, shrunk
from bitpolicy.sensitivity.table import SensitivityTable

FORMATS = parse_formats("int4,int4-g32,int5,int6,int8,fp16")[:-1]
LAYERS, SKETCHES = 60, 32


def random_table(
    real: float, seed: int, sketches: int = SKETCHES
) -> tuple[SensitivityTable, torch.Tensor, torch.Tensor]:
    """A table of noisy sketches, the weight errors, and the true errors: weight error x layer x deviation, where `real`
    is the standard deviation of the last one's logarithm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight_error = (normal(LAYERS, 1) - 2 * torch.arange(len(FORMATS))).exp()
    true = weight_error * (2 * normal(LAYERS, 1) + real * normal(LAYERS, len(FORMATS))).exp()
    drawn = (true.sqrt() * normal(sketches, LAYERS, len(FORMATS))).float()
    names = tuple(f"layer{i}" for i in range(LAYERS))
    error = drawn.double().square().mean(0)
    corrected = torch.zeros(error.shape, dtype=torch.bool)
    return SensitivityTable("adjoint", names, FORMATS, error, corrected, drawn), weight_error, true


def miss(error: torch.Tensor, true: torch.Tensor) -> float:
    """Mean square of the logarithm's error around each layer's own mean."""
    wrong = error.log() - true.log()
    return float((wrong - wrong.mean(1, keepdim=True)).square().mean())


@pytest.mark.parametrize(("real", "gain"), [(0.0, 4.0), (0.2, 1.8), (1.5, 1.0)])
def test_shrunk_errors_are_closer_to_the_true_ones_the_less_formats_differ(real: float, gain: float) -> None:
    before, after = 0.0, 0.0
    for seed in range(8):
        table, weight_error, true = random_table(real, seed)
        before, after = before + miss(table.error, true), after + miss(shrunk(table, weight_error).error, true)
    assert before / after > 0.99 * gain


def test_a_layers_own_level_stays() -> None:
    table, weight_error, _ = random_table(0.0, 0)
    found = shrunk(table, weight_error)
    assert torch.allclose(found.error.log().mean(1), table.error.log().mean(1))
    assert not torch.allclose(found.error, table.error)


def test_sketches_match_the_shrunk_errors() -> None:
    table, weight_error, _ = random_table(0.2, 0)
    found = shrunk(table, weight_error)
    assert found.sketches is not None
    assert torch.allclose(found.sketches.double().square().mean(0), found.error, rtol=1e-5)
    assert found.measured is None


def test_places_without_an_error_stay_and_do_not_disturb_others() -> None:
    table, weight_error, _ = random_table(0.2, 0)
    assert table.sketches is not None
    sketches = table.sketches.clone()
    sketches[:, 3] = 0  # a layer that is never called
    sketches[:, 5, 1] = 0
    weight_error[5, 1] = 0  # a format that does not fit
    error = sketches.double().square().mean(0)
    found = shrunk(
        SensitivityTable("adjoint", table.layers, FORMATS, error, table.corrected, sketches), weight_error
    ).error
    assert (found[3] == 0).all()
    assert found[5, 1] == 0
    assert torch.isfinite(found).all()
    assert (found[7] != error[7]).all()


def test_the_error_of_each_layers_own_rounding_method_counts() -> None:
    table, weight_error, _ = random_table(0.2, 0)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(2, table.error.shape, generator=generator, dtype=torch.uint8)
    other = weight_error * torch.rand(weight_error.shape, generator=generator, dtype=torch.float64)
    methods = torch.stack([torch.where(chosen == i, weight_error, other) for i in (0, 1)], 2).flatten(1)
    two = replace(table, quantizers=("rtn", "gptq"), quantizer=chosen)
    assert torch.equal(shrunk(two, methods).error, shrunk(table, weight_error).error)


def test_only_several_formats_and_enough_sketches_can_be_shrunk_and_no_rounded_inputs() -> None:
    assert can_shrink(8, 2, rounds_inputs=False)
    assert not can_shrink(7, 2, rounds_inputs=False)
    assert not can_shrink(8, 1, rounds_inputs=False)
    assert not can_shrink(8, 2, rounds_inputs=True)


def test_the_share_that_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    real, *noise = (torch.randn(200_000, generator=generator, dtype=torch.float64) for _ in range(3))
    assert kept_share(real, real) == pytest.approx(1.0)
    assert kept_share(noise[0], noise[1]) == pytest.approx(0.0, abs=0.02)
    halves = [real + 2.0 * part for part in noise]  # the mean of the two has noise of variance 2
    assert kept_share(*halves) == pytest.approx(1 / 3, abs=0.02)
