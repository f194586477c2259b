"""Every scheduler, with and without guidance: finite differences, steps, its own noise, and its state afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from toy_pipelines import FLOW_SCHEDULERS, SCHEDULERS

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.probes.adjoint import AdjointSketches
from bitpolicy.sensitivity.probes.stepwise import LocalSketches
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.sketches.directions import Random
from bitpolicy.sensitivity.sketches.sketch import Sketch

INT4 = format_named("int4")
STEPS, VECTOR = 3, 4
ACCURACY = 5e-6  # sketches are kept in float32
EXTRA_STEPS = {"PNDM": 1, "Heun": STEPS - 1, "flow Heun": STEPS - 1}  # beyond one for each of num_inference_steps
STOCHASTIC = ("DDPM", "Euler ancestral", "LCM")
GUIDED = {"with guidance": 3.0, "without guidance": 1.0}
EVERY = {name: ("StableDiffusionPipeline", new) for name, new in SCHEDULERS.items()}
EVERY |= {name: ("StableDiffusion3Pipeline", new) for name, new in FLOW_SCHEDULERS.items()}


def subject_with(new_subject: Any, scheduler: str, dtype: torch.dtype = torch.float32, guidance: float = 3.0) -> Any:
    toy, new = EVERY[scheduler]
    return new_subject(toy, dtype, new(), num_inference_steps=STEPS, guidance_scale=guidance)


@dataclass(frozen=True)
class Sketched:
    """A toy in float64 under one scheduler, and the sketch of one sample."""

    subject: Any
    sketch: Sketch

    def moves(self, signs: torch.Tensor) -> dict[Any, torch.Tensor]:
        layers = self.subject.layers.items()
        changes = {layer.weight: self.subject.weight_change(name, INT4) for name, layer in layers}
        return {weight: sign * change for sign, (weight, change) in zip(signs, changes.items(), strict=True)}

    def slope(self, signs: torch.Tensor, step: int | None = None) -> float:
        moves = self.moves(signs)
        with self.subject.unrounded():
            return self.subject.slope(moves, VECTOR, step)


@pytest.fixture(scope="module", params=EVERY)
def scheduler(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=GUIDED)
def sketched(request: Any, scheduler: str, new_subject: Any, made_up_means: Any) -> Sketched:
    subject = subject_with(new_subject, scheduler, torch.float64, GUIDED[request.param])
    with subject.unrounded():
        probe = AdjointSketches(
            subject.trajectories,
            candidates([INT4]),
            quantization=Quantization(calibration=Calibration(made_up_means(subject))),
        )
        (sketch,) = probe.sketches(subject.samples[0], [Random(VECTOR)])
    return Sketched(subject, sketch)


def random_signs(count: int) -> torch.Tensor:
    return torch.randint(2, (count,), generator=torch.Generator().manual_seed(1)).double() * 2 - 1


def test_all_layers_together_have_the_slope_that_finite_differences_find(sketched: Sketched) -> None:
    found = sketched.sketch.weight.double().sum(0)[:, 0]
    signs = random_signs(len(found))
    assert float(found @ signs) == pytest.approx(sketched.slope(signs), abs=ACCURACY * float(found.norm()))


def test_each_step_has_the_slope_of_moving_weights_in_that_step_alone(sketched: Sketched, scheduler: str) -> None:
    weight = sketched.sketch.weight.double()[..., 0]
    assert len(weight) == sketched.subject.trajectories.steps == STEPS + EXTRA_STEPS.get(scheduler, 0)
    signs = random_signs(weight.shape[1])
    for step in range(len(weight)):
        tolerance = ACCURACY * float(weight.norm())
        assert float(weight[step] @ signs) == pytest.approx(sketched.slope(signs, step), abs=tolerance), step


# The scheduler's state afterwards


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def test_the_scheduler_is_restored_and_keeps_no_graph(new_subject: Any, made_up_means: Any, scheduler: str) -> None:
    subject = subject_with(new_subject, scheduler)
    state, sample = vars(subject.pipe.scheduler), subject.samples[0]
    before = dict(state)
    expected = subject.final_latent(sample)  # leaves a history behind, as a user's own call does
    used = dict(state)
    assert len(list(tensors_in(used))) >= len(list(tensors_in(before)))
    adjoint = AdjointSketches(
        subject.trajectories,
        candidates([INT4]),
        quantization=Quantization(calibration=Calibration(made_up_means(subject))),
    )
    stepwise = LocalSketches(
        subject.trajectories,
        candidates([INT4]),
        quantization=Quantization(calibration=Calibration(made_up_means(subject))),
    )
    for passes in (adjoint.sketches(sample, [Random(0), Random(1)]), stepwise.sketches(sample, [0])):
        for _ in passes:
            pass
        assert not any(tensor.requires_grad for tensor in tensors_in(list(state.values())))
        assert list(state) == list(used)
        assert all(state[name] is value for name, value in used.items())
    assert torch.equal(subject.final_latent(sample), expected)


# Noise that is drawn in the loop


def with_the_same_start(subject: Any) -> Any:
    """Start every sample from the same noise, so that all differences come from noise drawn in the loop."""
    prepared = subject.pipe.prepare_latents
    shared = torch.Generator().manual_seed(0)

    def prepare(*args: Any, **kwargs: Any) -> torch.Tensor:
        own = prepared(*args, **kwargs)
        return torch.randn(own[:1].shape, generator=shared.manual_seed(0)).expand_as(own)

    subject.pipe.prepare_latents = prepare
    return subject


def test_a_sample_depends_only_on_its_seed(new_subject: Any, scheduler: str) -> None:
    """It does not depend on torch's own random state, and leaves that state unchanged."""
    subject = with_the_same_start(subject_with(new_subject, scheduler))
    first = replace(subject.samples[0], seed=1)
    found = []
    for sample, state in ((first, 100), (first, 101), (replace(first, seed=2), 100)):
        torch.manual_seed(state)
        before = torch.random.get_rng_state()
        found.append(next(subject.trajectories.latents([sample])))
        with_graph = subject.trajectories.differentiable_signal(sample).detach()[0]
        torch.testing.assert_close(with_graph, found[-1], rtol=1e-3, atol=1e-4)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) == (scheduler not in STOCHASTIC)


def test_samples_that_share_a_call_equal_those_alone(new_subject: Any, scheduler: str) -> None:
    subject = subject_with(new_subject, scheduler)
    alone = torch.stack([subject.final_latent(sample)[0] for sample in subject.samples])
    together = torch.stack(list(subject.trajectories.latents(subject.samples)))
    error = (together - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1)
    assert error.max() < 1e-4


@pytest.mark.parametrize("name", ["DDPM", "Euler ancestral"])
def test_noise_that_a_pipeline_draws_without_its_generator_follows_the_seed(new_subject: Any, name: str) -> None:
    """DiT uses its generator only for the initial noise."""
    subject = new_subject("DiTPipeline", scheduler=SCHEDULERS[name](), num_inference_steps=STEPS)
    sample = subject.samples[0]
    found = []
    for state in (100, 101):
        torch.manual_seed(state)
        found.append(next(subject.trajectories.latents([sample])))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][None], subject.final_latent(sample))
    torch.testing.assert_close(
        subject.trajectories.differentiable_signal(sample).detach()[0], found[0], rtol=1e-3, atol=1e-4
    )
    alone = [next(subject.trajectories.latents([sample])) for sample in subject.samples]
    assert torch.equal(torch.stack(list(subject.trajectories.latents(subject.samples))), torch.stack(alone))
