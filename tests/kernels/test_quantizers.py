"""Rounding methods: each against an inequality it must satisfy, and `gptq` against the textbook update."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest
import scipy.linalg
import torch
from toy_formats import E2M1_LEVELS, KINDS

from bitpolicy.kernels.errors import BitPolicyError, FormatError
from bitpolicy.kernels.formats.grid import Grid, GridFormat
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.quantizers.gptq import Curvature, gptq
from bitpolicy.kernels.quantizers.named import AUTO, HESSIANS, QUANTIZERS, parse_quantizer, quantize_data_free
from bitpolicy.kernels.quantizers.range_search import hqq, mse, searched_grid

GRIDS = [format for format in KINDS if isinstance(format, GridFormat)]
SMALL = [
    format_named(name)
    for name in "int2 int3-channel-sym int4 int4-g32 int5-g32-rot nf4 fp8 int8 nvfp4 mxfp4 fp8-tensor".split()
]
WITH_ZEROS = [format for format in GRIDS if format.parameters().get("symmetric") is False]
SHAPES = [(6, 128), (5, 101), (3, 7), (2, 1), (4, 6, 3), (4, 16, 3, 3), (3, 128, 1, 3)]
DAMPING = 0.1
ROUNDERS = [name for name in QUANTIZERS if name not in HESSIANS] + ["gptq"]
"""Distinct rounding methods. Those with a Hessian differ only in which Hessian it is."""

every_grid = pytest.mark.parametrize("format", GRIDS, ids=lambda f: f.name)
every_small = pytest.mark.parametrize("format", SMALL, ids=lambda f: f.name)
Stored = Mapping[str, torch.Tensor]


def fitting(format: GridFormat, shapes: list[tuple[int, ...]] = SHAPES) -> list[tuple[int, ...]]:
    """The shapes that the format fits."""
    found = [shape for shape in shapes if format.fits(shape)]
    assert found
    return found


def heavy_tailed(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Weights where clipping helps: many small ones and a few large ones, not symmetric."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=draw).pow(3) + 0.3 * torch.rand(shape, generator=draw)).half()


def inputs_hessian(length: int, seed: int = 0, rows: int = 512) -> torch.Tensor:
    """X^T X / n of correlated inputs of unequal size, float32."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(length, length, generator=draw, dtype=torch.float64) / length**0.5
    size = torch.logspace(-1, 1, length, dtype=torch.float64)[torch.randperm(length, generator=draw)]
    x = torch.randn(rows, length, generator=draw, dtype=torch.float64) @ (mixing + torch.eye(length)) * size
    return (x.T @ x / rows).float()


def storage_rows(weight: torch.Tensor) -> torch.Tensor:
    """(out, K), channels fastest, float64."""
    return weight.double().movedim(1, -1).flatten(1)


def error_rows(format: GridFormat, stored: Stored, weight: torch.Tensor) -> torch.Tensor:
    """Q(W) - W in storage order, float64, shape (out, K)."""
    return storage_rows(format.dequantize(stored, weight.shape, torch.float32)) - storage_rows(weight)


def group_sums(format: GridFormat, values: torch.Tensor) -> torch.Tensor:
    """Sums over the weights that share a scale, shape (out, groups)."""
    group = format.parameters()["group"]
    run = group if isinstance(group, int) else values.shape[1]
    return torch.stack([part.sum(1) for part in values.split(run, dim=1)], dim=1)


def weighted(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """sum_rows dw^T H dw."""
    return float((error @ hessian.double() * error).sum())


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def codes_of(format: GridFormat, stored: Stored, shape: tuple[int, ...]) -> torch.Tensor:
    return format.load(stored, shape)[0]


@every_grid
def test_every_rounding_method_stores_what_the_format_specifies(format: GridFormat) -> None:
    for shape, quantizer in product(fitting(format, [(6, 128), (3, 7), (2, 1), (3, 128, 1, 3)]), ROUNDERS):
        weight = heavy_tailed(shape)
        stored = quantized(quantizer, format, weight, inputs_hessian(weight[0].numel()))
        assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
            name: (spec.dtype, spec.shape) for name, spec in format.tensors(shape, torch.float16).items()
        }
        assert list(stored) == list(format.tensors(shape, torch.float16))
        assert all(tensor.is_contiguous() for tensor in stored.values()), (quantizer, shape)
        back = format.dequantize(stored, shape, torch.float32)
        assert torch.isfinite(back).all(), (quantizer, shape)
        assert (back - weight).norm() < weight.float().norm(), (quantizer, shape)  # better than all zeros


@every_grid
def test_a_zero_weight_stays_zero(format: GridFormat) -> None:
    for shape in fitting(format, [(3, 128), (3, 7), (2, 1)]):
        for quantizer in ROUNDERS:
            stored = quantized(quantizer, format, torch.zeros(shape), inputs_hessian(shape[1]))
            flat = 2.0**-127 if format.parameters().get("scale") == "e8m0" else 1
            assert (stored["weight_scale"].float() == flat).all(), (quantizer, shape)
            assert not format.dequantize(stored, shape, torch.float32).any(), (quantizer, shape)


@every_small
def test_rounding_is_deterministic_and_leaves_the_weight_unchanged(format: GridFormat) -> None:
    weight, hessian = heavy_tailed((6, 128)), inputs_hessian(128)
    before = weight.clone(), hessian.clone()
    for quantizer in ROUNDERS:
        first, second = (quantized(quantizer, format, weight, hessian) for _ in range(2))
        assert all(torch.equal(as_bytes(first[n]), as_bytes(second[n])) for n in first), quantizer
        assert torch.equal(weight, before[0]), quantizer
        assert torch.equal(hessian, before[1]), quantizer


@pytest.mark.parametrize("quantizer", ROUNDERS)
def test_a_non_finite_weight_is_refused(quantizer: str) -> None:
    weight = heavy_tailed((6, 128))
    weight[3, 5] = float("nan")
    for format in SMALL:
        with pytest.raises(FormatError, match="keep this layer at fp16"):
            quantized(quantizer, format, weight, inputs_hessian(128))


def quantized(quantizer: str, format: GridFormat, weight: torch.Tensor, hessian: torch.Tensor) -> Stored:
    if quantizer == "gptq":
        return gptq(format, weight, Curvature.of(format.rotated_hessian(hessian)))
    return quantize_data_free(quantizer, format, weight)


# mse


@every_grid
def test_mse_is_no_worse_than_rtn_in_any_group(format: GridFormat) -> None:
    for shape, seed in product(fitting(format), range(2)):
        weight = heavy_tailed(shape, seed)
        found, nearest = (
            group_sums(format, error_rows(format, stored, weight).square())
            for stored in (mse(format, weight), format.quantize(weight))
        )
        assert (found <= nearest * (1 + 1e-4) + 1e-12).all(), (shape, seed)


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int4-sym", "int4-rot", "nf4", "int3-channel"])
def test_mse_clearly_helps_at_few_bits(name: str) -> None:
    format, weight = format_named(name), heavy_tailed((32, 256))
    found, nearest = (
        error_rows(format, s, weight).square().sum() for s in (mse(format, weight), format.quantize(weight))
    )
    assert found < 0.97 * nearest


@every_small
def test_a_weighted_search_is_no_worse_under_its_weights(format: GridFormat) -> None:
    weight, diagonal = heavy_tailed((16, 128)), torch.logspace(-3, 3, 128)
    format, rows = format.settled(weight), format.rows(weight)
    found, nearest = (
        group_sums(format, (decoded(format, rows, grid) - rows).double().square() * diagonal)
        for grid in (searched_grid(format, rows, diagonal), format.grid(*format.extremes(rows)))
    )
    assert (found <= nearest * (1 + 1e-4)).all()


def decoded(format: GridFormat, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
    return levels_of(format, format.nearest(rows, grid), grid)


def levels_of(format: GridFormat, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The values of codes (out, K)."""
    return format.decode(format.grouped(codes), grid.wide).flatten(1)[:, : codes.shape[1]]


# hqq


@every_grid
def test_hqq_has_no_larger_lp_loss_than_rtn_in_any_group(format: GridFormat) -> None:
    noise = 1e-3 if "rotation" in format.parameters() else 1e-5  # rotating back errs by 1e-7, and |1e-7|^0.7 is 1e-5
    for shape, seed in product(fitting(format), range(2)):
        weight = heavy_tailed(shape, seed)
        rows = format.rows(weight).double()
        found, nearest = (
            group_sums(format, (format.rows(format.dequantize(s, shape, torch.float32)).double() - rows).abs().pow(0.7))
            for s in (hqq(format, weight), format.quantize(weight))
        )
        assert (found <= nearest * (1 + noise) + noise).all(), (shape, seed)


def test_hqq_finds_better_grids_than_rtn() -> None:
    format, weight = format_named("int3"), heavy_tailed((64, 256))
    found, nearest = (
        error_rows(format, s, weight).abs().pow(0.7).sum() for s in (hqq(format, weight), format.quantize(weight))
    )
    assert found < 0.99 * nearest


# gptq


def by_the_textbook(format: GridFormat, stored: Stored, weight: torch.Tensor, hessian: torch.Tensor) -> np.ndarray:
    """Levels of optimal brain quantization on the grids of `stored`, in float64 with an explicit inverse.

    Columns go by descending diagonal. After each one, the rest moves by the closed solution of least dw^T H dw, and the
    column is eliminated from the inverse (Frantar and Alistarh 2022, "Optimal Brain Compression", equation 3).
    """
    scaled = hessian.double().numpy() / hessian.double().diagonal().mean().item()
    damped = scaled + DAMPING * np.eye(len(scaled))
    inverse = np.linalg.inv(damped)
    levels = grid_levels(format, stored, weight.shape)
    left, found = format.rows(weight).double().numpy().copy(), np.zeros((len(weight), len(scaled)))
    waiting = np.ones(len(scaled), bool)
    for j in np.argsort(-np.diag(damped), kind="stable"):
        for row in range(len(left)):
            found[row, j] = levels[row, j, np.argmin(np.abs(levels[row, j] - left[row, j]))]
        waiting[j] = False
        error = (left[:, j] - found[:, j]) / inverse[j, j]
        left[:, waiting] -= error[:, None] * inverse[j, waiting]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return found


def grid_levels(format: GridFormat, stored: Stored, shape: tuple[int, ...]) -> np.ndarray:
    """Every level of each weight's group, float64, shape (out, K, levels)."""
    length = int(np.prod(shape[1:]))
    _, grid = format.load(stored, shape)
    bits, name = format.parameters()["bits"], format.name
    codes = torch.arange(-127.0, 128.0) if name == "int8" else torch.arange(float(2**bits))
    if format.parameters().get("variant") == "e2m1":
        codes = torch.tensor(E2M1_LEVELS)
    if format.parameters().get("variant") == "e4m3":
        codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
        codes = codes[codes.isfinite()]
    each = [levels_of(format, code.expand(shape[0], length), grid) for code in codes]
    return torch.stack(each, -1).double().numpy()


@pytest.mark.parametrize("format", [f for f in SMALL if f.name != "int5-g32-rot"], ids=lambda f: f.name)
def test_gptq_matches_the_textbook_update(format: GridFormat) -> None:
    for length, seed in itertools.product([5, 64, 70, 130], range(2)):
        weight, hessian = heavy_tailed((4, length), seed), inputs_hessian(length, seed)
        stored = gptq(format, weight, Curvature.of(hessian))
        expected = by_the_textbook(format, stored, weight, hessian)
        back = format.dequantize(stored, weight.shape, torch.float32).double().numpy()
        np.testing.assert_allclose(back, expected, rtol=1e-6, atol=1e-9, err_msg=f"K = {length}, seed {seed}")


def test_gptq_of_a_convolution_takes_the_hessian_in_storage_order() -> None:
    weight = heavy_tailed((4, 5, 3, 2))
    hessian = inputs_hessian(30)
    format = format_named("int3-g32")
    flat = weight.permute(0, 2, 3, 1).reshape(4, 30).contiguous()
    of_rows, of_weight = (gptq(format, w, Curvature.of(hessian)) for w in (flat, weight))
    assert all(torch.equal(of_rows[name], of_weight[name]) for name in of_rows)


def test_a_rotated_format_rounds_like_a_weight_rotated_by_hand() -> None:
    weight, hessian = heavy_tailed((4, 128)).float(), inputs_hessian(128)
    rotation = rotation_of(64, 128).float()
    by_itself = gptq(format_named("int3-rot"), weight, Curvature.of(format_named("int3-rot").rotated_hessian(hessian)))
    by_hand = gptq(format_named("int3"), weight @ rotation, Curvature.of(rotation.T @ hessian @ rotation))
    same = [float((by_itself[name] == by_hand[name]).float().mean()) for name in by_hand]
    assert min(same) > 0.98  # two ways of rounding in float32 may differ at a tie


def rotation_of(run: int, length: int) -> torch.Tensor:
    """Block diagonal, orthogonal, float64, shape (K, K)."""
    block = scipy.linalg.hadamard(run) / run**0.5
    return torch.from_numpy(scipy.linalg.block_diag(*[block] * (length // run)))


@pytest.mark.parametrize("name", ["int4-g32-rot", "int4-rot", "int4-g128-sym-rot"])
def test_a_rotated_hessian_gives_a_rotated_change_the_same_error(name: str) -> None:
    format, hessian = format_named(name), inputs_hessian(128)
    change = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    rotated = rotation_of(format.rotation, 128)
    expected = weighted(change.double(), hessian)
    assert weighted(change.double() @ rotated, format.rotated_hessian(hessian)) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        format.rotated_hessian(hessian).double(), rotated.T @ hessian.double() @ rotated, rtol=1e-4, atol=1e-4
    )


def test_unrotated_formats_leave_the_hessian_unchanged() -> None:
    hessian = inputs_hessian(8)
    for format in GRIDS:
        if "rotation" not in format.parameters():
            assert format.rotation == 0, format.name
            assert torch.equal(format.rotated_hessian(hessian), hessian), format.name


@every_small
def test_gptq_has_a_smaller_hessian_error_than_rtn_on_the_same_grids(format: GridFormat) -> None:
    ratios = []
    for seed in range(12):
        weight, hessian = heavy_tailed((8, 128), seed), inputs_hessian(128, seed)
        curvature = Curvature.of(format.rotated_hessian(hessian))
        format, rows = format.settled(weight), format.rows(weight)
        grid = searched_grid(format, rows, curvature.of_rows(*rows.shape))
        nearest = format.store(format.nearest(rows, grid), grid, weight.shape)
        found = gptq(format, weight, curvature)
        ratios.append(
            weighted(error_rows(format, found, weight), hessian)
            / weighted(error_rows(format, nearest, weight), hessian)
        )
    assert np.mean(ratios) < 0.9
    assert max(ratios) < 1.0


@every_small
def test_gptq_equals_rounding_to_nearest_for_uncorrelated_inputs(format: GridFormat) -> None:
    """A diagonal H offers no compensation. With rotation, H must be diagonal in the rotated basis."""
    weight, diagonal = heavy_tailed((8, 128)), torch.logspace(-2, 2, 128)
    stored = gptq(format, weight, Curvature.of(torch.diag(diagonal)))
    rows = format.rows(weight)
    _, grid = format.load(stored, weight.shape)
    assert torch.equal(codes_of(format, stored, weight.shape).float(), format.nearest(rows, grid))


@every_small
def test_scaling_a_hessian_changes_nothing(format: GridFormat) -> None:
    weight, hessian = heavy_tailed((4, 128)), inputs_hessian(128)
    found = [gptq(format, weight, Curvature.of(hessian * factor)) for factor in (1.0, 2.0**40, 2.0**-40)]
    for other in found[1:]:
        assert all(torch.equal(as_bytes(other[name]), as_bytes(found[0][name])) for name in other)


@every_grid
def test_gptq_with_a_zero_hessian_is_mse(format: GridFormat) -> None:
    weight = heavy_tailed((6, 128))
    found, expected = gptq(format, weight, Curvature.of(torch.zeros(128, 128))), mse(format, weight)
    back, wanted = (format.dequantize(s, weight.shape, torch.float32) for s in (found, expected))
    torch.testing.assert_close(back, wanted, rtol=1e-6, atol=0)


@every_grid
def test_a_low_rank_hessian_is_enough(format: GridFormat) -> None:
    for shape, rank in product(fitting(format), range(3)):
        weight = heavy_tailed(shape)
        x = torch.randn(rank, weight[0].numel(), generator=torch.Generator().manual_seed(5)) * 100
        hessian = x.T @ x
        stored = gptq(format, weight, Curvature.of(format.rotated_hessian(hessian)))
        error, nearest = (error_rows(format, s, weight) for s in (stored, format.quantize(weight)))
        assert torch.isfinite(error).all(), (shape, rank)
        assert weighted(error, hessian) <= weighted(nearest, hessian) * (1 + 1e-6) + 1e-12, (shape, rank)
        assert error.norm() < 0.6 * storage_rows(weight).norm(), (shape, rank)  # all zeros would give 1.0


def test_an_input_that_is_always_zero_is_harmless() -> None:
    """Dead channels: their rows and columns of H are zero."""
    hessian = inputs_hessian(64)
    hessian[10:20] = 0
    hessian[:, 10:20] = 0
    weight, format = heavy_tailed((4, 64)), format_named("int4")
    assert torch.isfinite(format.dequantize(gptq(format, weight, Curvature.of(hessian)), (4, 64), torch.float32)).all()


def test_a_curvature_orders_the_damped_hessian_by_descending_diagonal() -> None:
    hessian = inputs_hessian(40).double()
    damped = hessian / hessian.diagonal().mean() + DAMPING * torch.eye(40)
    found = Curvature.of(hessian.float())
    (order,), (factor,) = found.order.flatten(0, 1), found.factor.double().flatten(0, 1)
    assert order.tolist() == damped.diagonal().argsort(descending=True).tolist()
    torch.testing.assert_close(found.diagonal.double(), damped.diagonal()[None, None], rtol=1e-5, atol=0)
    ordered = damped[order][:, order]
    torch.testing.assert_close(factor.T @ factor @ ordered, torch.eye(40).double(), rtol=0, atol=1e-3)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("format", [f for f in SMALL if f.name != "int5-g32-rot"], ids=lambda f: f.name)
@pytest.mark.parametrize("seed", [1, 2])
def test_blocks_of_a_long_row_match_the_textbook_update_on_the_block_diagonal(format: GridFormat, seed: int) -> None:
    weight = heavy_tailed((4, 192), seed)
    blocks = [inputs_hessian(64, seed + i) * 3.0**i for i in range(3)]
    stored = gptq(format, weight, Curvature.of(torch.stack(blocks)[None]))
    expected = by_the_textbook(format, stored, weight, torch.block_diag(*blocks))
    back = format.dequantize(stored, weight.shape, torch.float32).double().numpy()
    np.testing.assert_allclose(back, expected, rtol=1e-6, atol=1e-9)
    whole = gptq(format, weight, Curvature.of(torch.block_diag(*blocks)))
    assert all(torch.equal(as_bytes(stored[name]), as_bytes(whole[name])) for name in whole)


@every_grid
def test_a_last_block_may_be_short(format: GridFormat) -> None:
    for shape in fitting(format, [(4, 200), (3, 384), (3, 128, 1, 3)]):
        weight, length = heavy_tailed(shape), int(np.prod(shape[1:]))
        blocks, k = -(-length // 128), 128
        hessian = torch.zeros(1, blocks, k, k)
        whole = inputs_hessian(length)
        for i in range(blocks):
            part = whole[i * k : (i + 1) * k, i * k : (i + 1) * k]
            hessian[0, i, : len(part), : len(part)] = part
        curvature = Curvature.of(format.rotated_hessian(hessian))
        stored = gptq(format, weight, curvature)
        seen = torch.block_diag(*[hessian[0, i] for i in range(blocks)])[:length, :length]
        found, searched = (weighted(error_rows(format, s, weight), seen) for s in (stored, mse(format, weight)))
        assert found <= searched, shape


@every_small
def test_each_group_of_rows_is_rounded_with_its_own_hessian(format: GridFormat) -> None:
    """A convolution with 2 groups, and a depthwise one with as many groups as rows."""
    for shape in fitting(format, [(6, 128), (6, 5, 3, 3), (8, 1, 3, 3), (6, 64, 2)]):
        groups = shape[0] if shape[1] == 1 else 2
        weight, length = heavy_tailed(shape), int(np.prod(shape[1:]))
        hessians = [inputs_hessian(length, seed) * 3.0**seed for seed in range(groups)]
        together = gptq(format, weight, Curvature.of(format.rotated_hessian(torch.stack(hessians)[:, None])))
        alone = [
            gptq(format.settled(weight), part, Curvature.of(format.rotated_hessian(hessian)))
            for part, hessian in zip(weight.chunk(groups), hessians, strict=True)
        ]
        for name, tensor in together.items():
            apart = torch.cat([a[name] for a in alone]) if tensor.ndim else alone[0][name]
            assert torch.equal(as_bytes(tensor), as_bytes(apart)), (name, shape)


# names


def test_auto_means_all_rounding_methods() -> None:
    assert parse_quantizer(AUTO) == QUANTIZERS == ("rtn", "mse", "hqq", "gptq", "gptq-trajectory")
    assert parse_quantizer(" GPTQ ") == ("gptq",)
    assert HESSIANS == {"gptq": "inputs", "gptq-trajectory": "trajectory"}


def test_an_unknown_rounding_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BitPolicyError, match=r"'awq'; write any of rtn, mse, hqq, gptq, gptq-trajectory, auto"):
        parse_quantizer("awq")
