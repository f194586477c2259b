"""The prior probe: its scores, and the regression that its coefficients come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitpolicy.kernels.formats.named import parse_formats
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import Layer, inventory
from bitpolicy.sensitivity.probes.prior import LEARNED, Prior, fitted
from bitpolicy.sensitivity.probes.run import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.samples import split_samples
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

ROLES, STAGES = ("conv", "attention_qkv", "output_head"), ("encoder", "decoder")
PLANTED = {
    "role conv": 1.0,
    "role attention_qkv": -2.0,
    "role output_head": 1.0,
    "stage encoder": -0.5,
    "stage decoder": 0.5,
    "log row length": 0.3,
    "log share of weights": -0.8,
}


def layers(seed: int, count: int = 400) -> list[Layer]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, 200, (count, 4), generator=generator).tolist()
    return [
        Layer(f"{i}", "Linear", (out, row), True, ROLES[role % len(ROLES)], STAGES[stage % len(STAGES)])
        for i, (out, row, role, stage) in enumerate(drawn)
    ]


def test_the_regression_finds_the_effects_that_were_planted_whatever_the_constant_of_each_model() -> None:
    models = [layers(0), layers(1)]
    effects = [
        Prior(PLANTED).log_effects(model) + constant for model, constant in zip(models, (3.0, -40.0), strict=True)
    ]
    found = fitted(zip(models, effects, strict=True)).log_effects(layers(2))
    expected = Prior(PLANTED).log_effects(layers(2))
    assert torch.allclose(found - found.mean(), expected - expected.mean(), atol=0.15)


def test_two_models_of_different_size_weigh_the_same() -> None:
    large, small = layers(0, 400), layers(1, 40)
    of_large, of_small = Prior({"role conv": 1.0}), Prior({"role conv": 3.0})
    learned = fitted([(large, of_large.log_effects(large)), (small, of_small.log_effects(small))])
    value = learned.coefficients["role conv"] - learned.coefficients["role attention_qkv"]
    assert value == pytest.approx(2.0, abs=0.35)


def test_a_role_that_was_never_seen_counts_as_zero() -> None:
    known = Layer("a", "Linear", (8, 8), True, "conv", "decoder")
    unknown = Layer("b", "Linear", (8, 8), True, "hypernetwork", "orbit")
    first, second = Prior({"role conv": 2.0, "stage decoder": 1.0}).log_effects([known, unknown]).tolist()
    assert (first, second) == (3.0, 0.0)


def test_scores_are_weight_errors_times_effects(new_trajectories: Callable[..., Trajectories], tmp_path: Path) -> None:
    trajectories = new_trajectories(num_inference_steps=1, guidance_scale=1.0)

    def table(probe: str) -> SensitivityTable:
        settings = ProbeSettings(probe, tuple(split_samples(["a red heart"], 1, seed=0)), vectors=1)
        formats, found = parse_formats("int4,int8,fp16"), inventory(trajectories.target)
        folder = tmp_path / probe
        run = ProbeRun(trajectories, found, formats, torch.float16, "toy", settings, folder, Stages(quiet=True))
        return run.table(run.reference())

    ratio = table("prior").error / table("weight").error
    effects = LEARNED.log_effects(inventory(trajectories.target)).exp()
    assert torch.allclose(ratio, effects[:, None].expand_as(ratio), rtol=1e-9)
    assert math.log(float(effects.max() / effects.min())) > 2
