"""A search for a program that stores several layers as one, on a tiny pipeline of the real class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from toy_pipelines import TOYS

import bitpolicy
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.exporters.targets import exporter_named
from bitpolicy.policies.exporters.tied import tied_layers
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.target import Target

SMALL = {
    "budget": "42%",
    "formats": "int4-g32,int8,fp16",
    "probe": "weight",
    "quantizer": "rtn",
    "calibration_samples": 2,
    "search_samples": 2,
    "confirm_samples": 1,
    "held_out_samples": 2,
    "prompts": tuple(f"a {word}" for word in "cat dog owl bee ant fox hen".split()),
    "remeasure": 0,
    "quiet": True,
}


@pytest.fixture(scope="module")
def flux() -> Any:
    return TOYS["FluxPipeline"].new()


@pytest.fixture(scope="module")
def search(flux: Any) -> Callable[..., Policy]:
    call = {**TOYS["FluxPipeline"].call, "num_inference_steps": 2}
    return lambda **asked: bitpolicy.search(flux, call=call, **{**SMALL, **asked})


def test_a_search_for_comfy_gives_merged_layers_one_format(
    flux: Any, search: Callable[..., Policy], tmp_path: Path
) -> None:
    """Without the target it does not, so the groups make a difference."""
    groups = tied_layers(exporter_named("comfy"), Target.chosen(flux))
    assert max(map(len, groups)) == 4

    def mixed(policy: Policy) -> list[list[str]]:
        choices = policy.resolve(Target.chosen(flux).layers)
        assert len({choice.format for choice in choices.values()}) > 1
        return [group for group in groups if len({choices[name].format for name in group}) > 1]

    assert mixed(search(trials=0)) != []
    policy = search(target="comfy", trials=3, space="layer")
    assert mixed(policy) == []
    assert policy.budget is not None
    assert policy.result is not None
    assert policy.result.policy_bytes <= policy.budget.bytes
    assert bitpolicy.export_for(flux, policy, tmp_path / "out", "comfy").requantized == ()
    with safe_open(tmp_path / "out" / "transformer.safetensors", "pt") as file:
        assert "single_blocks.0.linear1.weight" in file.keys()  # noqa: SIM118


def test_tied_layers_cannot_be_kept_at_two_formats(search: Callable[..., Policy]) -> None:
    keep = ("transformer_blocks.0.attn.to_q=int8", "transformer_blocks.0.attn.to_k=fp16")
    with pytest.raises(BitPolicyError, match=r"attn\.to_q and transformer_blocks\.0\.attn\.to_k must share a format"):
        search(target="comfy", trials=0, keep=keep)


def test_a_search_for_comfy_refuses_a_class_that_it_cannot_export_before_it_begins() -> None:
    pipe = TOYS["SanaPipeline"].new()
    with pytest.raises(BitPolicyError, match="SanaTransformer2DModel, which bitpolicy does not know"):
        bitpolicy.search(pipe, target="comfy", **SMALL)
