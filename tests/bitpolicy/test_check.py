"""`bitpolicy probe --check`: the probe's predictions compared with measurements."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from bitpolicy.check import Agreement, Check, CheckedPolicy, random_policies
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named

FORMATS = (format_named("int4"), format_named("int8"))


@pytest.fixture(scope="module")
def checked(command: Any, small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A check of every layer and of six policies, over two samples of one step."""
    folder = tmp_path_factory.mktemp("checked") / "out"
    probe = [*small[: small.index("--trials")], "--num-inference-steps", "1", "--samples", "2", "--vectors", "12"]
    done = command("probe", *probe, "--check", "--check-policies", "6", "--output-dir", folder)
    assert done.code == 0, done.err
    return done, folder


def test_the_check_reports_the_agreement(checked: tuple[Any, Path]) -> None:
    found = {a.what: a for a in Check.load(checked[1] / "check.json").agreements()}
    assert set(found) == {"int4", "int8", "policies", "policies, additive", "policies, held out"}
    for name in ("int4", "int8"):
        assert found[name].n == 83
        assert found[name].spearman > 0.95
        assert 0.8 < found[name].median_ratio < 1.25
    assert found["policies, additive"].spearman > 0.8


def test_quantizing_nothing_is_predicted_and_measured_as_nothing(checked: tuple[Any, Path]) -> None:
    null = Check.load(checked[1] / "check.json").policies[0]
    assert (null.predicted, null.additive, null.measured, null.psnr_db) == (0.0, 0.0, 0.0, None)
    assert "nothing quantized" in checked[0].out


def test_every_policy_has_its_errors_and_its_size(checked: tuple[Any, Path]) -> None:
    first, *others = Check.load(checked[1] / "check.json").policies
    assert len(others) == 6
    for policy in others:
        assert 0 < policy.nbytes < first.nbytes
        assert policy.predicted >= 0
        assert policy.measured > 0
        assert policy.psnr_db is not None
        assert 0 <= policy.bias <= 1


def test_a_check_is_loaded_as_it_was_saved(checked: tuple[Any, Path], tmp_path: Path) -> None:
    check = Check.load(checked[1] / "check.json")
    check.save(tmp_path / "check.json")
    assert Check.load(tmp_path / "check.json") == check
    assert (tmp_path / "check.json").read_bytes() == (checked[1] / "check.json").read_bytes()


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"agreements": 1}'])
def test_a_missing_or_damaged_check_names_the_command_that_creates_it(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "check.json").write_text(content)
    with pytest.raises(BitPolicyError, match=r"cannot read .*check\.json.*run `bitpolicy probe --check` again"):
        Check.load(tmp_path / "check.json")


def test_agreement_has_rank_correlation_ratio_and_share_within_2x() -> None:
    same = Agreement.of("x", [1.0, 2.0, 4.0, 30.0], [2.0, 4.0, 5.0, 10.0])
    assert (same.n, same.spearman, same.within_2x) == (4, 1.0, 0.75)
    assert same.median_ratio == pytest.approx((0.5 + 0.8) / 2)
    assert Agreement.of("x", [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]).spearman == -1.0
    assert Agreement.of("x", [1.0, 1.0], [3.0, 2.0]).spearman is None


def test_policies_that_destroy_the_picture_do_not_count() -> None:
    def policy(psnr: float | None, measured: float) -> CheckedPolicy:
        return CheckedPolicy(1, measured, measured, None, measured, measured, psnr, 0.0)

    policies = (policy(None, 0.0), policy(35.0, 0.1), policy(19.0, 1e6), policy(30.0, 0.2))
    none: list[list[float]] = []
    check = Check((), (), none, none, none, none, policies, 0)
    (vectors, additive) = check.agreements()
    assert (vectors.n, additive.n) == (2, 2)


def test_random_policies_cover_the_whole_range_and_stay_the_same() -> None:
    drawn = list(random_policies(200, FORMATS, 100))
    assert drawn == list(random_policies(200, FORMATS, 100))
    packed = sorted(sum(f is not FP16 for f in formats) / 200 for formats in drawn)
    assert packed[0] < 0.1
    assert packed[-1] > 0.9
    assert max(b - a for a, b in itertools.pairwise(packed)) < 0.1


def test_the_json_of_the_command_has_the_agreements(command: Any, checked: tuple[Any, Path], small: Any) -> None:
    probe = [*small[: small.index("--trials")], "--num-inference-steps", "1", "--samples", "2", "--vectors", "12"]
    arguments = ("--check", "--check-policies", "6", "--output-dir", checked[1], "--json")
    result = command("probe", *probe, *arguments).result
    assert set(result["check"]) >= {"int4", "int8", "policies"}
    assert all(math.isfinite(number) for numbers in result["check"].values() for number in numbers)
    content = json.loads((checked[1] / "check.json").read_text())
    assert result["check"]["int4"] == [content["agreements"][0]["spearman"], content["agreements"][0]["median_ratio"]]
