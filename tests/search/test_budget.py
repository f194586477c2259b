"""Budgets as users write them: what they mean in bytes, and the errors for invalid ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.policy_records import BudgetRecord, ModelReference
from bitpolicy.search.budget import Budget, BudgetError, Scope, read_bytes, readable
from bitpolicy.sensitivity.cost.peak_memory import LayerCall, PeakMemory

ACCOUNT = ByteAccount(torch.float16, {}, fixed=1_700_000_000, parameters=860_000_000)
"""A denoiser of 1.7 GB at FP16."""


def account(reference: int, parameters: int = 1000) -> ByteAccount:
    return ByteAccount(torch.float16, {}, fixed=reference, parameters=parameters)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("3GB", 3 * 10**9),
        ("3 GB", 3 * 10**9),
        ("  3GB\n", 3 * 10**9),
        ("3gb", 3 * 10**9),
        ("3GiB", 3 * 2**30),
        ("3gib", 3 * 2**30),
        ("0.6GB", 600_000_000),
        (".5GB", 500_000_000),
        ("1.5GiB", 3 * 2**29),
        ("700MB", 700_000_000),
        ("700MiB", 700 * 2**20),
        ("512kB", 512_000),
        ("512KiB", 512 * 1024),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("1000B", 1000),
        ("3000", 3000),
        (" 5000000 ", 5_000_000),
        ("4.35kB", 4350),
        ("45%", 765_000_000),
        ("45 %", 765_000_000),
        ("4.5%", 76_500_000),
        ("100%", 1_700_000_000),
        ("250%", 4_250_000_000),
        ("4.5bit", 483_750_000),
        ("4.5 bit", 483_750_000),
        ("4.5bits", 483_750_000),
        ("8BIT", 860_000_000),
    ],
)
def test_a_budget_is_an_exact_number_of_bytes(text: str, nbytes: int) -> None:
    budget = Budget.parse(text, ACCOUNT)
    assert budget.nbytes == nbytes
    assert budget.asked == text.strip()


@pytest.mark.parametrize(
    "text",
    "|three|GB|%|bit|3.5|-3|-3GB|-45%|+3GB|3GB!|3 000MB|1_000MB|3,5GB|1e9B|0x10MB|nan%|infGB|3G|3M|3PB|3GB 4GB"
    "|3.5.1GB|45%%|4.5bit/s| ".split("|"),
)
def test_an_invalid_size_is_refused_with_the_valid_forms(text: str) -> None:
    message = f"budget {text!r} is not a size; write 3GB, 3GiB, 700MB, 45% or 4.5bit"
    with pytest.raises(BudgetError, match=re.escape(message)):
        Budget.parse(text, ACCOUNT)


def test_a_lookalike_unit_is_refused() -> None:
    with pytest.raises(BudgetError, match="not a size"):
        Budget.parse("3iB", ACCOUNT)


def test_an_absurdly_large_number_is_refused() -> None:
    for unit in ("%", "bit", "GB"):
        with pytest.raises(BudgetError):
            Budget.parse("9" * 400 + unit, ACCOUNT)


@pytest.mark.parametrize("text", ["0", "0MB", "0%", "0bit", "0.0GB", "0.3B", "0.00000001%"])
def test_a_zero_budget_is_refused_with_the_size_at_fp16(text: str) -> None:
    with pytest.raises(BudgetError, match="is zero bytes; the FP16 denoiser has 1,700,000,000 bytes"):
        Budget.parse(text, ACCOUNT)


@pytest.mark.parametrize(("text", "instead"), [("3Gb", "3GB"), ("700Mb", "700MB"), ("3Gib", "3GiB"), ("8Kb", "8KB")])
def test_a_size_in_bits_is_refused_with_the_byte_form(text: str, instead: str) -> None:
    with pytest.raises(BudgetError, match=f"budget '{text}' .*bits; write {instead} for bytes"):
        Budget.parse(text, ACCOUNT)


def test_errors_name_what_the_size_is_of() -> None:
    assert read_bytes("10GB", "--max-shard-size") == 10**10
    for text, message in (("many", "is not a size; write a size such as 10GB"), ("3Gb", ".*bits; write 3GB")):
        with pytest.raises(BudgetError, match=f"^--max-shard-size '{text}' {message}"):
            read_bytes(text, "--max-shard-size")
    with pytest.raises(BudgetError, match="is not a size"):
        read_bytes("45%", "--max-shard-size")


def test_a_hundred_percent_is_the_whole_reference() -> None:
    """With one byte less, the unquantized denoiser no longer fits."""
    wrong = [n for n in range(1, 3000) if Budget.parse("100%", account(n)).nbytes != n]
    assert wrong == []


def test_whole_bits_are_whole_bytes() -> None:
    wrong = [n for n in range(1, 3000) if Budget.parse("16bit", account(1, n)).nbytes != 2 * n]
    assert wrong == []


def test_a_percentage_is_rounded_down() -> None:
    for percent in range(1, 100):
        for reference in (3, 29, 401_288, 1_719_045_126):
            nbytes = Budget.parse(f"{percent + 1}%", account(reference * 100)).nbytes
            assert 0 <= reference * (percent + 1) - nbytes <= 1


def test_a_budget_that_fits_is_accepted() -> None:
    Budget.parse("3MB", ACCOUNT).require(3_000_000, ["int4"])


def test_a_budget_too_small_names_the_smallest_size_and_the_remedies() -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse("3MB", ACCOUNT).require(3_410_001, ["int4", "int8", "fp16"])
    message = str(caught.value)
    for part in ("'3MB'", "3,000,000 bytes", "int4, int8, fp16", "3,410,001 bytes", "3.41 MB", "3.25 MiB"):
        assert part in message
    assert message.endswith("raise --budget or add a smaller format to --formats")


def test_a_budget_too_small_for_a_target_program_explains_why() -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse("3MB", ACCOUNT).require(3_410_001, ["int4", "fp16"], "ComfyUI", 1)
    assert str(caught.value) == (
        "budget '3MB' is 3,000,000 bytes, below the smallest policy that ComfyUI can hold with int4, fp16: 3,410,001 "
        f"bytes (3.41 MB, 3.25 MiB); ComfyUI cannot pack 1 of {len(ACCOUNT.shapes)} layers, which stay FP16; raise "
        "--budget, add a smaller format to --formats, or leave out --target"
    )


def test_messages_show_both_units() -> None:
    assert str(Budget.parse("3GB", ACCOUNT)) == "3,000,000,000 bytes (3 GB, 2.79 GiB)"
    assert str(Budget.parse("4.5bit", ACCOUNT)) == "483,750,000 bytes (484 MB, 461 MiB)"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (999, "999 B"),
        (1000, "1 kB, 0.977 KiB"),
        (2**20, "1.05 MB, 1 MiB"),
        (5 * 10**6, "5 MB, 4.77 MiB"),
        (2**30, "1.07 GB, 1 GiB"),
    ],
)
def test_sizes_are_printed_in_both_units(nbytes: int, text: str) -> None:
    assert readable(nbytes) == text


def test_no_size_is_written_with_an_exponent() -> None:
    assert [n for n in (999_999, 999_999_999, 10**12, 5 * 10**12) if "e+" in readable(n)] == []


def test_a_budget_error_is_a_user_error() -> None:
    assert issubclass(BudgetError, BitPolicyError)


# Scopes

INT4 = format_named("int4")
PIPELINE = Scope.of_pipeline(ACCOUNT, others=300_000_000)


def peak_scope(batch_size: int = 1) -> Scope:
    """Two layers of 1000 x 1000 in float16 plus 50,000 bytes; other models 1,000,000; 400,000 for activations.

    INT4 takes 15,000,000 bytes to unpack, more than the 2,000,000 of a layer in FP16 that it saves.
    """
    shape = (1000, 1000)
    account = ByteAccount(torch.float16, {"large": shape, "other": shape}, fixed=50_000, parameters=2_000_000)
    calls = {name: LayerCall(0, 0) for name in account.shapes}
    unpacking = {(INT4, shape): 15_000_000}
    return Scope.of_peak(
        PeakMemory(account, 1_000_000, 400_000, calls, unpacking, 512, 640, batch_size, "cuda"), [INT4, FP16]
    )


def test_an_account_alone_means_scope_weights() -> None:
    assert Budget.parse("45%", ACCOUNT) == Budget.parse("45%", Scope.of_weights(ACCOUNT))
    assert Budget.parse("45%", ACCOUNT).nbytes == Budget.parse("45%", ACCOUNT).total


@pytest.mark.parametrize(
    ("text", "total"), [("1.5GB", 1_500_000_000), ("50%", 1_000_000_000), ("100%", 2_000_000_000), ("1B", 1)]
)
def test_scope_pipeline_subtracts_the_other_models(text: str, total: int) -> None:
    budget = Budget.parse(text, PIPELINE)
    assert budget.total == total
    assert budget.nbytes == total - 300_000_000


@pytest.mark.parametrize(("text", "total"), [("5MB", 5_000_000), ("100%", 5_450_000), ("50%", 2_725_000)])
def test_scope_peak_subtracts_other_models_and_activations(text: str, total: int) -> None:
    budget = Budget.parse(text, peak_scope())
    assert budget.total == total
    assert budget.nbytes == total - 1_400_000
    assert budget.scope.barred == {("large", INT4), ("other", INT4)}


def test_only_scope_peak_bars_formats() -> None:
    assert PIPELINE.barred == Scope.of_weights(ACCOUNT).barred == frozenset()


@pytest.mark.parametrize("scope", [PIPELINE, peak_scope()])
def test_bits_per_parameter_need_scope_weights(scope: Scope) -> None:
    with pytest.raises(BudgetError, match=f"'4.5bit' .*bits .* scope {scope.name} .* --scope weights"):
        Budget.parse("4.5bit", scope)


@pytest.mark.parametrize(
    ("scope", "reference"),
    [
        (PIPELINE, "the FP16 pipeline has 2,000,000,000 bytes"),
        (peak_scope(), "at FP16 a pipeline call at 640 x 512 pixels takes 5,450,000 bytes"),
        (peak_scope(3), "at FP16 a pipeline call at 640 x 512 pixels, 3 at once takes 5,450,000 bytes"),
    ],
)
def test_a_zero_budget_is_refused_with_the_scopes_size_at_fp16(scope: Scope, reference: str) -> None:
    with pytest.raises(BudgetError, match=f"budget '0%' is zero bytes; {reference}"):
        Budget.parse("0%", scope)


def test_a_pipeline_budget_too_small_names_the_parts_and_the_minimum() -> None:
    budget = Budget.parse("700MB", PIPELINE)
    budget.require(400_000_000, ["int4"])
    with pytest.raises(BudgetError) as caught:
        budget.require(400_000_001, ["int4", "fp16"])
    assert str(caught.value) == (
        "budget '700MB' is 700,000,000 bytes for the pipeline; the other models take 300,000,000, which leaves "
        "400,000,000 for the denoiser, below the smallest policy with int4, fp16: 400,000,001 bytes; raise --budget to "
        "700,000,001 bytes (700 MB, 668 MiB), add a smaller format to --formats, or use --scope weights"
    )


def test_a_peak_budget_too_small_names_the_parts_and_the_minimum() -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse("1MB", peak_scope(2)).require(4_050_000, ["int4", "fp16"])
    assert str(caught.value) == (
        "budget '1MB' is 1,000,000 bytes for a pipeline call at 640 x 512 pixels, 2 at once; the other models take "
        "1,000,000 and activations 400,000, which leaves 0 for the denoiser, below the smallest policy with int4, "
        "fp16: 4,050,000 bytes; raise --budget to 5,450,000 bytes (5.45 MB, 5.2 MiB), add a smaller format to "
        "--formats, or give a smaller --height, --width or --batch-size"
    )


def test_the_printed_budget_names_the_parts() -> None:
    assert str(Budget.parse("1.5GB", PIPELINE)) == (
        "1,500,000,000 bytes (1.5 GB, 1.4 GiB) for the pipeline; the other models take 300,000,000, which leaves "
        "1,200,000,000 for the denoiser"
    )


# What the policy file records

PEAK_RECORD: dict[str, Any] = {
    "asked": "5MB",
    "bytes": 5_000_000,
    "scope": "peak",
    "other_bytes": 1_000_000,
    "activation_bytes": 400_000,
    "height": 512,
    "width": 640,
    "batch_size": 1,
    "device": "cuda",
    "compute_dtype": "float16",
}


@pytest.mark.parametrize(
    ("scope", "record"),
    [
        (Scope.of_weights(ACCOUNT), {"asked": "5MB", "bytes": 5_000_000, "scope": "weights"}),
        (PIPELINE, {"asked": "5MB", "bytes": 5_000_000, "scope": "pipeline", "other_bytes": 300_000_000}),
        (peak_scope(), PEAK_RECORD),
    ],
)
def test_the_record_has_what_its_scope_needs_and_survives_the_file(
    scope: Scope, record: dict[str, Any], tmp_path: Path
) -> None:
    made = Budget.parse(" 5MB", scope).record
    assert made.model_dump(exclude_none=True) == record
    model = ModelReference(id="toy", component="unet", class_name="toy", sha256="")
    Policy(model=model, budget=made).save(tmp_path / "policy.yaml")
    assert Policy.load(tmp_path / "policy.yaml").budget == made


@pytest.mark.parametrize("name", sorted(PEAK_RECORD.keys() - {"asked", "bytes", "scope"}))
def test_a_record_without_what_its_scope_needs_is_refused(name: str) -> None:
    BudgetRecord.model_validate(PEAK_RECORD)
    with pytest.raises(ValidationError, match=f"scope 'peak' needs {name}"):
        BudgetRecord.model_validate({**PEAK_RECORD, name: None})
    with pytest.raises(ValidationError, match=f"scope 'weights' does not allow {name}"):
        BudgetRecord.model_validate({"asked": "5MB", "bytes": 5_000_000, name: PEAK_RECORD[name]})
