"""Requests other than a budget, on a tiny pipeline of the real class."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpolicy
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.loading import source_of
from bitpolicy.policies.policy import Policy
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.settings import Settings
from bitpolicy.workflow.plan import make_plan
from bitpolicy.workflow.search_run import SearchRun

CALL = (("num_inference_steps", 2), ("height", 16), ("width", 16))
SMALL = {
    "call": CALL,
    "trials": 0,
    "calibration_samples": 3,
    "vectors": 1,
    "search_samples": 2,
    "confirm_samples": 2,
    "held_out_samples": 2,
    "prompts": tuple(f"a {word}" for word in "cat dog owl bee ant fox hen pig".split()),
    "remeasure": 0,
}


def searched(pipe: Any, **asked: Any) -> Policy:
    return bitpolicy.search(pipe, quiet=True, **{**SMALL, "call": dict(CALL), **asked})


def formats(policy: Policy, pipe: Any) -> dict[str, str]:
    names = [layer.name for layer in make_plan(Settings(budget="100%"), source_of(pipe)).layers]
    return {name: choice.format.name for name, choice in policy.resolve(names).items()}


def psnr_db(pipe: Any, folder: Path, samples: Any) -> float:
    """PSNR of an exported checkpoint, from its definition."""
    reference = torch.stack([image for image, _ in Trajectories(pipe, ["unet"], dict(CALL)).images(samples)])
    packed = bitpolicy.load_pipeline(folder, dtype=torch.float32)
    images = torch.stack([image for image, _ in Trajectories(packed, ["unet"], dict(CALL)).images(samples)])
    return float((-10 * (images - reference).square().flatten(1).mean(1).log10()).mean())


def test_a_target_is_reached_by_the_exported_checkpoint_and_not_by_a_tenth_less(
    new_toy_pipeline: Callable[[], Any], tmp_path: Path
) -> None:
    pipe = new_toy_pipeline()
    policy = searched(pipe, target_psnr=45.0, quantizer="rtn")
    assert policy.result is not None
    assert policy.budget is not None
    assert policy.budget.asked == "45 dB"
    assert policy.provenance["search"]["held"]
    bitpolicy.export(pipe, policy, tmp_path / "checkpoint")
    plan = make_plan(Settings(budget="100%", **SMALL), source_of(pipe))
    assert psnr_db(pipe, tmp_path / "checkpoint", plan.split.confirm) >= 45.0 - 1e-3
    smaller = searched(pipe, budget=f"{int(policy.result.policy_bytes * 0.9)}B", quantizer="rtn")
    bitpolicy.export(pipe, smaller, tmp_path / "smaller")
    assert psnr_db(pipe, tmp_path / "smaller", plan.split.search) < 45.0


def test_an_unreachable_target_is_refused_with_the_best_quality(toy_pipeline: Any) -> None:
    with pytest.raises(BitPolicyError, match=r"no policy reaches 149\.00 dB: the most accurate with int4, int8"):
        searched(toy_pipeline, target_psnr=149.0)


def test_kept_layers_have_their_format_and_qkv_share_one(toy_pipeline: Any) -> None:
    keep = ("conv_in=int8", "*time_embedding*=fp16", "conv_out=int4-g32")
    found = formats(searched(toy_pipeline, budget="45%", keep=keep, share_qkv=True), toy_pipeline)
    assert found["conv_in"] == "int8"
    assert found["conv_out"] == "int4-g32"
    assert {f for name, f in found.items() if "time_embedding" in name} == {"fp16"}
    assert "int4-g32" not in {f for name, f in found.items() if name != "conv_out"}
    attentions = {name.removesuffix(".to_q") for name in found if name.endswith(".to_q")}
    assert attentions
    for attention in attentions:
        assert len({found[f"{attention}.{leaf}"] for leaf in ("to_q", "to_k", "to_v")}) == 1


@pytest.mark.parametrize("trials", [0, 1])
def test_the_curve_is_written_as_policies_that_export(toy_pipeline: Any, tmp_path: Path, trials: int) -> None:
    settings = Settings(budget=None, frontier=5, quantizer="gptq", **{**SMALL, "trials": trials})
    plan = make_plan(settings, source_of(toy_pipeline))
    assert SearchRun(settings, plan, tmp_path, Stages(quiet=True)).decide() is None
    folder = tmp_path / "frontier"
    rows = list(csv.DictReader((folder / "frontier.csv").read_text().splitlines()))
    sizes, errors = [int(row["bytes"]) for row in rows], [float(row["predicted_error"]) for row in rows]
    assert len(rows) >= 4
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert all(bool(row["psnr_db"]) == bool(trials) or float(row["predicted_error"]) == 0 for row in rows)
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    written = bitpolicy.export(toy_pipeline, folder / rows[1]["policy"], tmp_path / "checkpoint")
    assert written == sizes[1]


def test_a_budget_for_the_pipeline_counts_the_other_models(toy_pipeline: Any) -> None:
    policy = searched(toy_pipeline, budget="80%", scope="pipeline")
    assert policy.budget is not None
    assert policy.result is not None
    assert policy.budget.other_bytes is not None
    assert policy.result.policy_bytes + policy.budget.other_bytes <= policy.budget.bytes
    others = sum(t.nbytes for t in _stored(toy_pipeline.vae, toy_pipeline.text_encoder))
    assert policy.budget.other_bytes == others


def _stored(*models: torch.nn.Module) -> list[torch.Tensor]:
    """Their tensors as the exported folder stores them: floats in float16."""
    tensors = [tensor for model in models for tensor in model.state_dict().values()]
    return [tensor.half() if tensor.is_floating_point() else tensor for tensor in tensors]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "asked for nothing; give one of budget=SIZE"),
        ({"budget": "50%", "target_psnr": 30.0}, "asked for budget and target_psnr"),
        ({"budget": "50%", "scope": "disk"}, "unknown scope 'disk'; write any of weights, pipeline, peak"),
        ({"budget": "50%", "height": 64}, 'add scope="peak"'),
        ({"budget": "50%", "quantizer": "awq"}, "unknown quantizer 'awq'; write any of rtn, mse, hqq, gptq"),
        ({"budget": "50%", "quantizer": "auto", "probe": "weight"}, "the weight probe cannot choose"),
        ({"target_lpips": -1.0}, "target_lpips is -1.0; give a distance above 0"),
    ],
    ids=str,
)
def test_meaningless_requests_are_refused(toy_pipeline: Any, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BitPolicyError, match=message):
        searched(toy_pipeline, **asked)


@pytest.mark.parametrize(
    ("target", "budget"), [("comfy", "92%"), ("sdnq", "55%"), ("torchao", "55%"), ("modelopt", "55%")]
)
def test_a_search_for_a_program_uses_only_formats_that_it_can_hold(
    toy_pipeline: Any, tmp_path: Path, target: str, budget: str
) -> None:
    asked = {"budget": budget, "trials": 0, "probe": "weight"}
    with pytest.raises(BitPolicyError, match="cannot hold"):
        bitpolicy.export_for(toy_pipeline, searched(toy_pipeline, formats="nf4", **asked), tmp_path / "free", target)
    policy = searched(toy_pipeline, formats="nf4,int8", target=target, **asked)
    assert {"int8", "fp16"} == set(formats(policy, toy_pipeline).values())
    assert bitpolicy.export_for(toy_pipeline, policy, tmp_path / "out", target).requantized == ()
    assert (tmp_path / "out" / "policy.yaml").is_file()


def test_an_unknown_program_is_refused_with_the_known_ones(toy_pipeline: Any) -> None:
    with pytest.raises(BitPolicyError, match="unknown target 'onnx'; write any of comfy, comfy-int8, sdnq"):
        searched(toy_pipeline, budget="50%", target="onnx")
