"""The model card of an exported pipeline describes its content."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch import nn

from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.checkpoints.model_card import PLAIN, Card, model_card
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.policy_records import BudgetRecord, Result
from bitpolicy.policies.target import Target

BYTES = 2 * (4 + 2 * 4) + 8 + 3 * 2 * 2  # codes and scales of two layers, a plain one, biases


CHOICES = {"0": Choice(format_named("int8")), "1": Choice(format_named("int8"), True), "2": Choice(FP16)}


def card(model: str = "someone/model", about: Card = PLAIN, **fields: Any) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    reference = {"id": model, "revision": "main", "component": "unet", "class": "Sequential", "sha256": "0"}
    policy = Policy(model=reference, **fields)
    text = model_card(policy, Target({"unet": nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))}), CHOICES, about)
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_counts_the_formats_and_quotes_the_result() -> None:
    budget = BudgetRecord(asked="40%", bytes=50)
    _, text = card(result=Result(policy_bytes=BYTES, predicted_error=0.00314159, psnr_db=34.26), budget=budget)
    assert "1 fp16, 2 int8" in text
    for row in (
        "base model | someone/model, revision main",
        f"tensor bytes of the unet | {BYTES} |",
        "unquantized | 36 (float16) |",
        "budget | 40% (scope weights) |",
        "rounding | rtn |",
        "corrected bias | 1 |",
        "34.3 dB |",
        "0.00314 |",
    ):
        assert row in text, row


def test_results_of_another_policy_are_not_quoted() -> None:
    """An edited policy still has the result of the policy before the edit."""
    _, text = card(result=Result(policy_bytes=BYTES + 1, predicted_error=0.00314159, psnr_db=34.26))
    assert "34.3" not in text
    assert "not measured" in text
    assert "not predicted" in text


def test_the_card_counts_layers_by_role() -> None:
    _, text = card(about=Card(roles={"0": "conv", "1": "attention_qkv", "2": "conv"}))
    assert "| role | fp16 | int8 | bytes of weights |" in text
    assert "| attention_qkv |  | 1 | 12 |" in text
    assert "| conv | 1 | 1 | 20 |" in text


@pytest.mark.parametrize("location", ["this/folder", "me/toy"])
def test_the_snippet_loads_the_folder_of_the_card(location: str) -> None:
    _, text = card(about=Card(location))
    lines = text.split("```python\n")[1].split("```")[0].splitlines()
    assert lines[0].startswith("import bitpolicy")
    assert lines[-1] == f'pipe = DiffusionPipeline.from_pretrained("{location}")'
    compile("\n".join(lines), "snippet", "exec")


@pytest.mark.parametrize("fields", [{}, {"result": Result(policy_bytes=1)}], ids=["no result", "nothing measured"])
def test_the_card_says_what_was_not_measured(fields: dict[str, Any]) -> None:
    _, text = card(**fields)
    assert "not measured" in text
    assert "not predicted" in text


def test_the_card_gives_the_bytes_of_a_handwritten_policy() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    formats = {"0": format_named("int8"), "1": format_named("int8"), "2": FP16}
    nbytes = ByteAccount.of(Target({"unet": model}), torch.float16).total(formats)
    assert f"tensor bytes of the unet | {nbytes} |" in card()[1]


@pytest.mark.parametrize(
    ("model", "base"),
    [("someone/model", "someone/model"), ("/data/model", None), ("./model", None), ("a/b/c", None), ("model", None)],
)
def test_only_a_hub_id_is_named_as_the_base_model(model: str, base: str | None) -> None:
    front, text = card(model)
    assert front.get("base_model") == base
    assert front["library_name"] == "diffusers"
    assert f"# {model}, quantized by bitpolicy" in text
