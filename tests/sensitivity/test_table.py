"""The sensitivity table: its numbers follow from the sketches by arithmetic, and a file restores it."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.rounding.quantizer_choice import chosen
from bitpolicy.sensitivity.sketches.sketch import Sketch
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.table_files import ModelContext, read_table, write_table

INT4, INT8 = format_named("int4"), format_named("int8")
POWER = 4.0


def random_sketches(count: int = 6, steps: int = 3) -> list[Sketch]:
    """The last layer has no bias. For the others, correcting the bias sometimes helps and sometimes harms."""
    draw = torch.Generator().manual_seed(2)
    shape = (steps, 4, 2)
    made = []
    for _ in range(count):
        weight = torch.randn(shape, generator=draw)
        bias = -0.5 * weight + 0.4 * torch.randn(shape, generator=draw) * torch.tensor([0.1, 1.0, 3.0, 0.0])[:, None]
        bias[:, 3] = 0
        made.append(Sketch(weight, bias))
    return made


@pytest.fixture
def sketches() -> list[Sketch]:
    return random_sketches()


@pytest.fixture
def table(sketches: list[Sketch]) -> SensitivityTable:
    return SensitivityTable.from_sketches(["a", "b", "c", "d"], candidates([INT4, INT8]), sketches, POWER)


def test_the_error_is_the_mean_square_of_the_sketches_with_the_better_bias(
    table: SensitivityTable, sketches: list[Sketch]
) -> None:
    for layer in range(4):
        for column in range(2):
            plain = sum(float(s.weight[:, layer, column].sum()) ** 2 for s in sketches) / len(sketches) / POWER
            both = [float((s.weight + s.bias)[:, layer, column].sum()) ** 2 for s in sketches]
            corrected = sum(both) / len(sketches) / POWER
            assert float(table.error[layer, column]) == pytest.approx(min(plain, corrected), rel=1e-5)
            assert bool(table.corrected[layer, column]) == (corrected <= plain)
    assert table.corrected[:3].any()
    assert not table.corrected[:3].all()


def test_the_mean_of_the_squared_sketches_is_the_error(table: SensitivityTable) -> None:
    assert table.sketches is not None
    torch.testing.assert_close(table.sketches.double().square().mean(0), table.error, rtol=1e-5, atol=0)


def test_sketches_by_step_give_the_table_of_sketches_of_the_whole_trajectory(
    table: SensitivityTable, sketches: list[Sketch]
) -> None:
    whole = [sketch.rows(lambda rows: rows.sum(0, keepdim=True)) for sketch in sketches]
    found = SensitivityTable.from_sketches(["a", "b", "c", "d"], candidates([INT4, INT8]), whole, POWER)
    torch.testing.assert_close(found.error, table.error)
    assert torch.equal(found.corrected, table.corrected)


def test_measured_errors_replace_predictions(table: SensitivityTable) -> None:
    assert table.sketches is not None
    assert table.source(1, 0) == "adjoint"
    found = table.remeasured({(1, 0): 0.25})
    assert found.sketches is not None
    assert float(found.error[1, 0]) == 0.25
    assert (found.source(1, 0), found.source(0, 0)) == ("ablation", "adjoint")
    torch.testing.assert_close(found.sketches.double().square().mean(0), found.error, rtol=1e-5, atol=0)
    untouched = torch.ones_like(table.error, dtype=torch.bool)
    untouched[1, 0] = False
    assert torch.equal(found.error[untouched], table.error[untouched])
    again = found.remeasured({(2, 1): 0.5})
    assert again.measured is not None
    assert again.measured.nonzero().tolist() == [[1, 0], [2, 1]]


def test_largest_lists_only_errors_beyond_first_order() -> None:
    error = torch.tensor([[1e-2, 1e-5], [0.5, 2e-3], [9e-4, 0.0]], dtype=torch.float64)
    table = SensitivityTable("adjoint", ("a", "b", "c"), (INT4, INT8), error, torch.ones(3, 2, dtype=torch.bool))
    assert table.largest(2) == [(1, 0), (0, 0)]
    assert table.largest(6) == [(1, 0), (0, 0), (1, 1)]


def test_halves_are_the_tables_of_half_the_sketches(table: SensitivityTable, sketches: list[Sketch]) -> None:
    halves = table.halves()
    assert halves is not None
    for half, part in zip(halves, (sketches[:3], sketches[3:]), strict=True):
        plain = torch.stack([s.weight.sum(0)[3] for s in part]).double().square().mean(0) / POWER
        torch.testing.assert_close(half.error[3], plain, rtol=1e-5, atol=0)


QUANTIZERS = ("rtn", "mse", "gptq")


def sketches_of_quantizers(count: int = 24) -> list[Sketch]:
    """Two formats with three quantizers each, format by format. Each quantizer is the best for some layer."""
    draw = torch.Generator().manual_seed(7)
    size, noise = 10 ** (1.5 * torch.rand(6, 6, generator=draw)), 1.6 * torch.rand(6, 6, generator=draw)
    weights = [size * torch.randn(3, 6, 6, generator=draw) for _ in range(count)]
    return [Sketch(w, size * noise * torch.randn(3, 6, 6, generator=draw) - 0.3 * w) for w in weights]


def better_beyond_doubt(squares: dict[str, list[float]], first: str) -> str:
    """The best of `first` and the quantizers that beat it in a paired t-test at two standard errors."""
    pairs = {q: np.subtract(squares[first], squares[q]) for q in QUANTIZERS if q != first}
    doubt = {q: scipy.stats.ttest_1samp(d, 0, alternative="greater").pvalue for q, d in pairs.items()}
    better = [q for q in pairs if doubt[q] < scipy.stats.norm.sf(2)]
    return min([first, *better], key=lambda q: sum(squares[q]))


def test_a_layer_takes_the_common_quantizer_unless_another_is_better_beyond_doubt() -> None:
    sketches = sketches_of_quantizers()
    tried, layers = candidates([INT4, INT8], QUANTIZERS), range(6)
    table = SensitivityTable.from_sketches(list("abcdef"), tried, sketches, POWER)
    taken = set()
    for column, format in enumerate((INT4, INT8)):
        squares, biases = {}, {}
        for layer, (place, quantizer) in itertools.product(layers, enumerate(QUANTIZERS, start=3 * column)):
            both = [
                [float((s.weight + corrected * s.bias)[:, layer, place].sum()) ** 2 / POWER for s in sketches]
                for corrected in (0, 1)
            ]
            biases[layer, quantizer] = sum(both[1]) <= sum(both[0])
            squares[layer, quantizer] = min(both, key=sum)
        total = {q: list(np.sum([squares[layer, q] for layer in layers], 0)) for q in QUANTIZERS}
        first = better_beyond_doubt(total, "gptq")
        for layer in layers:
            best = better_beyond_doubt({q: squares[layer, q] for q in QUANTIZERS}, first)
            assert table.choice(layer, format) == Choice(format, biases[layer, best], best)
            assert float(table.error[layer, column]) == pytest.approx(np.mean(squares[layer, best]), rel=1e-5)
            least = min(QUANTIZERS, key=lambda q: sum(squares[layer, q]))
            taken.add((best == first, best == least, biases[layer, best]))
            place = QUANTIZERS.index(best) + 3 * column
            steps = torch.stack([s.weight + s.bias if biases[layer, best] else s.weight for s in sketches])
            steps = steps[:, :, layer, place]
            assert table.sketches is not None
            torch.testing.assert_close(table.sketches[:, layer, column], steps.sum(1) / POWER**0.5)
    assert {(left, least) for left, least, _ in taken} == {(True, True), (True, False), (False, True)}
    assert {corrected for _, _, corrected in taken} == {True, False}


# Squares with a known mean: five quantizers, of which the last two are nearly equal

TRUTH = torch.tensor([2.0, 1.6, 3.5, 1.0, 1.05], dtype=torch.float64).repeat(120, 1)
TRUTH[7] = torch.tensor([2.0, 0.02, 3.5, 1.0, 1.05])  # one layer for which another is far better


def drawn_squares(seed: int, count: int = 32) -> torch.Tensor:
    """Squares of normal variables with the given power, shape (count, layers, 1, quantizers)."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(count, *TRUTH.shape, generator=draw, dtype=torch.float64).square() * TRUTH)[:, :, None]


def expected_error(choice: torch.Tensor) -> float:
    return float(TRUTH.gather(1, choice).sum())


def test_chance_does_not_decide_between_nearly_equal_quantizers() -> None:
    """The lowest score, an earlier rule, picks worse quantizers and predicts errors that are too low."""
    for seed in range(20):
        power = drawn_squares(seed)
        lowest, found = power.mean(0).argmin(-1), chosen(power, 3)
        assert expected_error(found) < 0.99 * expected_error(lowest), seed
        assert expected_error(found) < 1.06 * float(TRUTH.amin(1).sum()), seed
        assert power.mean(0).gather(2, lowest[..., None]).sum() < 0.88 * expected_error(lowest), "the curse"
        assert (found != found.mode(0).values).sum() < 20


def test_a_layer_takes_a_quantizer_that_is_far_better_for_it() -> None:
    assert [int(chosen(drawn_squares(seed), 3)[7, 0]) for seed in range(20)] == [1] * 20


def test_few_layers_deviate_with_few_sketches_and_none_with_one() -> None:
    assert chosen(drawn_squares(0, 1), 2).unique().tolist() == [2]
    for count in (2, 3, 4, 8):
        found = chosen(drawn_squares(0, count), 3)
        assert 0 < (found != found.mode(0).values).sum() < 0.12 * len(found), count


@pytest.mark.parametrize("costly", [0, 1])
def test_layers_without_effect_do_not_decide_for_a_format(costly: int) -> None:
    """A hundred layers have almost no effect on the image and one has a large effect. Only that one counts."""
    power = torch.tensor([0.9, 1.1, 0.8, 1.2] * 4, dtype=torch.float64)[:, None, None, None].repeat(1, 101, 1, 2)
    power[:, :100] *= 1e-9
    power[:, :100, :, 1 - costly] *= 0.999  # better, beyond doubt
    power[:, 100, :, 1 - costly] *= 1.5
    for usual in (0, 1):
        found = chosen(power, usual).flatten().tolist()
        assert found == [1 - costly] * 100 + [costly]
        noisy = power.clone()
        noisy[:, :100, :, costly] *= torch.tensor([1.1, 0.9])[torch.arange(16) // 2 % 2][:, None, None]
        assert chosen(noisy, usual).flatten().tolist() == [costly] * 101


@pytest.mark.parametrize("usual", range(5))
def test_a_format_takes_a_quantizer_that_is_better_over_all_layers(usual: int) -> None:
    """It does not take one that is better by only a twentieth, which 32 sketches can seldom show."""
    of_format = [int(chosen(drawn_squares(seed), usual).mode(0).values) for seed in range(10)]
    assert set(of_format) <= {3, 4}
    assert usual != 3 or of_format.count(3) == 10


@pytest.mark.parametrize(("tried", "taken"), [(("rtn", "mse", "gptq"), "gptq"), (("mse", "rtn"), "mse")], ids=str)
def test_among_equal_quantizers_the_default_or_else_the_first_is_taken(tried: tuple[str, ...], taken: str) -> None:
    sketches = [Sketch(torch.ones(2, 1, 2 * len(tried)), torch.zeros(2, 1, 2 * len(tried)))] * 3
    table = SensitivityTable.from_sketches(["a"], candidates([INT4, INT8], tried), sketches, POWER)
    assert [table.choice(0, format).quantizer for format in (INT4, INT8)] == [taken, taken]


def test_a_single_quantizer_applies_to_every_layer() -> None:
    sketch = Sketch(torch.ones(2, 1, 2), torch.zeros(2, 1, 2))
    table = SensitivityTable.from_sketches(["a"], candidates([INT4, INT8], ("gptq",)), [sketch], POWER)
    assert table.quantizer is None
    assert table.choice(0, INT8).quantizer == "gptq"
    assert table.choice(0, FP16) == Choice(FP16)


def test_a_saved_table_keeps_its_quantizers(toy_unet: Any, tmp_path: Path) -> None:
    layers = inventory(Target({"unet": toy_unet}))
    draw = torch.Generator().manual_seed(4)
    shape = (2, len(layers), 6)
    size = 100 ** torch.randn(shape[1:], generator=draw)
    sketches = [Sketch(size * torch.randn(shape, generator=draw), size * torch.zeros(shape)) for _ in range(9)]
    names = [layer.name for layer in layers]
    table = SensitivityTable.from_sketches(names, candidates([INT4, INT8], QUANTIZERS), sketches, POWER)
    write_table(table, tmp_path, ModelContext(layers, ByteAccount.of(Target({"unet": toy_unet}), torch.float16)))
    found = read_table(tmp_path / "sensitivity.safetensors")
    assert found.quantizers == QUANTIZERS
    assert found.quantizer is not None
    assert table.quantizer is not None
    assert torch.equal(found.quantizer, table.quantizer)
    for layer in range(len(layers)):
        assert [found.choice(layer, f) for f in (INT4, INT8)] == [table.choice(layer, f) for f in (INT4, INT8)]
    rows = list(csv.DictReader((tmp_path / "sensitivity.csv").open()))
    expected = [table.choice(i, f).quantizer for i in range(len(layers)) for f in (INT4, INT8)]
    assert [row["quantizer"] for row in rows] == expected
    assert len(set(expected)) == 3


def test_layers_that_no_gradient_reached_score_zero() -> None:
    nothing = [Sketch(torch.zeros(3, 2, 1), torch.zeros(3, 2, 1))]
    table = SensitivityTable.from_sketches(["a", "b"], candidates([INT4]), nothing, POWER)
    assert table.error.tolist() == [[0.0], [0.0]]
    assert table.sketches is not None
    assert not table.sketches.any()
    assert table.vector_error([INT4, INT4]) == 0.0


def test_fp16_scores_zero_and_adds_nothing(table: SensitivityTable) -> None:
    assert [table.score(layer, FP16) for layer in range(4)] == [0.0] * 4
    assert (table.vector_error([FP16] * 4), table.additive_error([FP16] * 4)) == (0.0, 0.0)
    assert table.choice(0, FP16) == Choice(FP16, False)


def test_the_prediction_for_one_quantized_layer_is_its_error(table: SensitivityTable) -> None:
    for layer in range(4):
        for format in (INT4, INT8):
            formats = [FP16] * 4
            formats[layer] = format
            assert table.vector_error(formats) == pytest.approx(table.score(layer, format), rel=1e-5)
            assert table.additive_error(formats) == table.score(layer, format)


def test_errors_of_layers_add_up_as_vectors(table: SensitivityTable, sketches: list[Sketch]) -> None:
    columns = [0, 1, 0, 1]
    totals = []
    for s in sketches:
        with_bias = [s.weight + s.bias if table.corrected[i, c] else s.weight for i, c in enumerate(columns)]
        totals.append(sum(float(with_bias[i][:, i, c].sum()) for i, c in enumerate(columns)))
    expected = sum(total**2 for total in totals) / len(totals) / POWER
    assert table.vector_error([INT4, INT8, INT4, INT8]) == pytest.approx(expected, rel=1e-5)


def test_errors_add_up_as_powers_with_sketches_or_without() -> None:
    error = torch.tensor([[0.5, 0.1], [0.25, 0.05]], dtype=torch.float64)
    table = SensitivityTable("ablation", ("a", "b"), (INT4, INT8), error, torch.zeros(2, 2, dtype=torch.bool))
    assert table.additive_error([INT4, INT8]) == pytest.approx(0.55)
    assert table.additive_error([INT8, FP16]) == pytest.approx(0.1)
    assert table.vector_error([INT8, FP16]) is None


def test_weight_errors_predict_no_image_error() -> None:
    table = SensitivityTable("weight", ("a",), (INT4,), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert (table.additive_error([INT4]), table.vector_error([INT4])) == (None, None)


def test_a_choice_takes_the_bias_that_scored_better(table: SensitivityTable) -> None:
    for layer in range(4):
        assert table.choice(layer, INT8) == Choice(INT8, bool(table.corrected[layer, 1]))


def random_scores(count: int, layers: int) -> list[Sketch]:
    draw = torch.Generator().manual_seed(count)
    return [
        Sketch(torch.randn(3, layers, 2, generator=draw), torch.randn(3, layers, 2, generator=draw))
        for _ in range(count)
    ]


@pytest.fixture
def saved(toy_unet: Any, tmp_path: Path) -> tuple[SensitivityTable, Path]:
    layers = inventory(Target({"unet": toy_unet}))
    names = [layer.name for layer in layers]
    table = SensitivityTable.from_sketches(names, candidates([INT4, INT8]), random_scores(5, len(names)), POWER)
    write_table(table, tmp_path, ModelContext(layers, ByteAccount.of(Target({"unet": toy_unet}), torch.float16)))
    return table, tmp_path


def test_a_saved_table_loads_unchanged(saved: tuple[SensitivityTable, Path]) -> None:
    table, folder = saved
    found = read_table(folder / "sensitivity.safetensors")
    assert (found.probe, found.layers, found.formats) == (table.probe, table.layers, table.formats)
    for name in ("error", "corrected", "sketches"):
        assert torch.equal(getattr(found, name), getattr(table, name)), name
        assert getattr(found, name).dtype == getattr(table, name).dtype


def test_a_table_without_sketches_loads_without_sketches(toy_unet: Any, tmp_path: Path) -> None:
    layers = inventory(Target({"unet": toy_unet}))
    error = torch.rand(len(layers), 1, dtype=torch.float64)
    names = tuple(layer.name for layer in layers)
    table = SensitivityTable("ablation", names, (INT8,), error, torch.ones(len(layers), 1, dtype=torch.bool))
    write_table(table, tmp_path, ModelContext(layers, ByteAccount.of(Target({"unet": toy_unet}), torch.float16)))
    found = read_table(tmp_path / "sensitivity.safetensors")
    assert (found.probe, found.sketches) == ("ablation", None)
    assert torch.equal(found.error, error)


def test_the_csv_has_a_row_for_every_layer_and_format(saved: tuple[SensitivityTable, Path], toy_unet: Any) -> None:
    table, folder = saved
    rows = list(csv.DictReader((folder / "sensitivity.csv").open()))
    assert [(row["layer"], row["format"]) for row in rows] == [
        (name, format) for name in table.layers for format in ("int4", "int8")
    ]
    first = rows[table.layers.index("conv_in") * 2]
    described = {name: first[name] for name in ("role", "stage", "kind", "shape")}
    assert described == {"role": "input_stem", "stage": "ends", "kind": "Conv2d", "shape": "16x4x3x3"}
    assert int(first["bytes"]) == 16 * (36 // 2 + 2 + 1)  # nibbles, one scale and one zero point a row
    assert (first["quantizer"], first["source"]) == ("rtn", "adjoint")
    assert float(first["error"]) == pytest.approx(table.score(table.layers.index("conv_in"), INT4), rel=1e-6)


def test_the_error_for_a_missing_table_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BitPolicyError, match=r"cannot read sensitivity table .*; run `bitpolicy probe` again"):
        read_table(tmp_path / "sensitivity.safetensors")


def test_the_error_for_a_damaged_table_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "sensitivity.safetensors").write_bytes(b"not a table")
    with pytest.raises(BitPolicyError, match=r"cannot read sensitivity table .*; run `bitpolicy probe` again"):
        read_table(tmp_path / "sensitivity.safetensors")
