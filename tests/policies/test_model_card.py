"""The card of an exported pipeline says what it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch import nn

from bitpolicy.kernels.formats import FP16, format_named
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.model_card import model_card
from bitpolicy.policies.policy import Choice, Policy, Result


def card(model: str = "someone/model", **fields: Any) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    reference = {"id": model, "component": "unet", "class": "Sequential", "sha256": "0"}
    choices = {"0": Choice(format_named("int8")), "1": Choice(format_named("int8")), "2": Choice(FP16)}
    policy = Policy(model=reference, **fields)
    text = model_card(policy, nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), choices)
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_it_counts_the_formats_and_quotes_the_result() -> None:
    _, text = card(result=Result(policy_bytes=1234567, predicted_error=0.00314159, psnr_db=34.26))
    assert "1 fp16, 2 int8" in text
    assert "1,234,567" in text
    assert "34.3 dB" in text
    assert "0.00314" in text


@pytest.mark.parametrize("fields", [{}, {"result": Result(policy_bytes=1)}], ids=["no result", "nothing measured"])
def test_it_says_what_was_not_measured(fields: dict[str, Any]) -> None:
    _, text = card(**fields)
    assert "not measured" in text
    assert "not predicted" in text


def test_it_tells_the_bytes_of_a_policy_that_a_person_wrote() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    formats = {"0": format_named("int8"), "1": format_named("int8"), "2": FP16}
    nbytes = ByteAccount.of(model, torch.float16).total(formats)
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
