"""The best single format in a policy's bytes, against every possible one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16, parse_formats
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.policy import Choice
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.workflow.uniform import Uniform, best_uniform

FORMATS = parse_formats(("int3", "int4", "int4-g32", "int6", "int8", "fp16"))
INT4, INT8 = (next(f for f in FORMATS if f.name == name) for name in ("int4", "int8"))
PACKED = [format for format in FORMATS if format.packed]
SHAPES = {"a": (16, 64), "b": (32, 64), "c": (8, 128), "d": (64, 32), "e": (24, 96)}


@pytest.fixture(params=range(3))
def problem(request: pytest.FixtureRequest) -> Problem:
    """Half of FP16. Scores are random: a wider format is not always better."""
    draw = torch.Generator().manual_seed(request.param)
    error = torch.rand(len(SHAPES), len(PACKED), generator=draw, dtype=torch.float64)
    corrected = torch.rand(error.shape, generator=draw) > 0.5
    layers = [Layer(name, "Linear", shape, True, "other", "ends") for name, shape in SHAPES.items()]
    table = SensitivityTable("ablation", tuple(SHAPES), PACKED, error, corrected, quantizers=("gptq",))
    account = ByteAccount(torch.float16, SHAPES, fixed=100, parameters=9000)
    return Problem(layers, FORMATS, account, table=table, budget=account.reference // 2)


def found(problem: Problem, policy: dict[str, Choice], formats: Sequence[Format] = FORMATS) -> Uniform:
    uniform = best_uniform(problem, formats, problem.account, policy)
    assert uniform is not None
    return uniform


def nbytes(problem: Problem, formats: dict[str, Format]) -> int:
    return problem.account.total(formats)


def everywhere(format: Format) -> dict[str, Format]:
    return dict.fromkeys(SHAPES, format)


@pytest.mark.parametrize("share", [0.25, 0.3, 0.4, 0.6, 0.99])
def test_it_is_the_best_of_all_that_fit(problem: Problem, share: float) -> None:
    """And otherwise the smallest, which is then said to be larger."""
    solved = replace(problem, budget=max(int(share * problem.account.reference), problem.smallest))
    policy = solved.choices(solved.solve())
    most = nbytes(problem, {name: choice.format for name, choice in policy.items()})
    sizes = {format: nbytes(problem, everywhere(format)) for format in PACKED}
    error = {f: sum(problem.table.score(i, f) for i in range(len(SHAPES))) for f in PACKED}
    fitting = [format for format in PACKED if sizes[format] <= most]
    expected = min(fitting, key=error.__getitem__) if fitting else min(PACKED, key=sizes.__getitem__)
    uniform = found(problem, policy)
    assert uniform.format == expected
    assert uniform.nbytes == sizes[expected]
    assert uniform.larger == (not fitting)
    assert uniform.name == f"{expected.name.upper()} everywhere"


def test_without_one_that_fits_it_is_the_smallest(problem: Problem) -> None:
    policy = {name: Choice(FORMATS[0]) for name in SHAPES}  # int3
    uniform = found(problem, policy, [INT8, INT4, FP16])
    assert (uniform.format, uniform.larger) == (INT4, True)
    assert uniform.nbytes > nbytes(problem, everywhere(FORMATS[0]))


def test_its_rounding_and_bias_are_those_that_scored_best(problem: Problem) -> None:
    uniform = found(problem, {name: Choice(FP16) for name in SHAPES}, [INT4])
    column = PACKED.index(INT4)
    for i, name in enumerate(SHAPES):
        assert uniform.choices[name] == Choice(INT4, bool(problem.table.corrected[i, column]), "gptq")


def test_layers_that_may_not_have_the_format_keep_the_policys(problem: Problem) -> None:
    """Pinned layers, barred ones, and those that share a format with one of them."""
    policy = {name: Choice(FP16) for name in SHAPES}
    kept = replace(problem, pinned={"a": INT8}, barred=frozenset({("b", INT4)}), tied=[["b", "c"]])
    uniform = found(kept, {**policy, "a": Choice(INT8)}, [INT4])
    assert {name: choice.format.name for name, choice in uniform.choices.items()} == {
        "a": "int8",
        "b": "fp16",
        "c": "fp16",
        "d": "int4",
        "e": "int4",
    }
    assert uniform.name == "INT4 in 2 of 5 layers"
    assert uniform.layers == 2


def test_where_no_layer_may_have_a_format_there_is_none(problem: Problem) -> None:
    policy = {name: Choice(FP16) for name in SHAPES}
    assert best_uniform(problem, [FP16], problem.account, policy) is None
    pinned = replace(problem, pinned=dict.fromkeys(SHAPES, FP16))
    assert best_uniform(pinned, FORMATS, problem.account, policy) is None
