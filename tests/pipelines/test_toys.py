"""The toy pipelines themselves: each runs, is reproducible, and has no zero weight or bias that would hide a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn
from toy_pipelines import FLOW_SCHEDULERS, SCHEDULERS, TOYS, Toy

QUANTIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
DENOISERS = ("unet", "transformer", "transformer_2", "controlnet", "motion_adapter")
SAMPLE: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "a red heart"},
    "class_labels": {"class_labels": [207]},
    "nothing": {},
}


@pytest.fixture(params=TOYS.values(), ids=TOYS)
def toy(request: pytest.FixtureRequest) -> Toy:
    return request.param


def draw(toy: Toy, pipe: DiffusionPipeline, seed: int = 1) -> torch.Tensor:
    """The image or video of one sample, shape (1, ...), in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(**SAMPLE[toy.takes], **toy.call, **toy.extra, generator=generator, output_type="pt")[0]


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def test_a_toy_has_the_class_of_its_name_in_float32_and_eval_mode(toy: Toy) -> None:
    pipe = toy.new()
    assert type(pipe).__name__ == toy.name.partition("-")[0]
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            assert not any(part.training for part in module.modules())
            assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_toy_draws_finite_pixels_that_depend_on_the_seed(toy: Toy) -> None:
    pipe = toy.new()
    image, other = draw(toy, pipe), draw(toy, pipe, seed=2)
    assert image.isfinite().all()
    assert image.std() > 0.01
    assert not torch.equal(image, other)


def test_two_new_toys_draw_the_same_and_leave_the_random_state_alone(toy: Toy) -> None:
    before = torch.random.get_rng_state()
    first = toy.new()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)  # moves the state on
    assert torch.equal(draw(toy, first), draw(toy, toy.new()))


def test_no_layer_has_a_zero_weight_or_bias(toy: Toy) -> None:
    zero = [
        f"{component}.{name}.{part}"
        for component, denoiser in denoisers(toy.new()).items()
        for name, layer in denoiser.named_modules()
        if isinstance(layer, QUANTIZABLE)
        for part, parameter in layer.named_parameters()
        if not parameter.any()
    ]
    assert zero == []


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_draws_with_every_scheduler(name: str) -> None:
    toy = TOYS["StableDiffusionPipeline"]
    pipe = toy.new()
    for scheduler in (SCHEDULERS[name](), SCHEDULERS[name](pipe.scheduler.config)):
        pipe.scheduler = scheduler
        assert draw(toy, pipe).isfinite().all()


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_stable_diffusion_3_draws_with_every_flow_scheduler(name: str) -> None:
    toy = TOYS["StableDiffusion3Pipeline"]
    pipe = toy.new()
    for scheduler in (FLOW_SCHEDULERS[name](), FLOW_SCHEDULERS[name](pipe.scheduler.config)):
        pipe.scheduler = scheduler
        assert draw(toy, pipe).isfinite().all()
