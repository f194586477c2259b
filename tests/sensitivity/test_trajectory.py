"""The sampling loop is diffusers' own: its results equal the pipeline's own call, with and without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.samples import Sample, split_samples
from bitpolicy.sensitivity.trajectory.trajectories import LoopError, Trajectories

NewTrajectories = Callable[..., Trajectories]
SCHEDULERS = [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
SAMPLES = [Sample("cat", 3), Sample("a red heart", 1_000_000), Sample("", 5)]


def own_call(trajectories: Trajectories, samples: list[Sample], output_type: str) -> torch.Tensor:
    return trajectories.pipe(
        [sample.prompt for sample in samples],
        generator=[torch.Generator().manual_seed(sample.seed) for sample in samples],
        output_type=output_type,
        **trajectories.call,
    ).images


@pytest.fixture(params=SCHEDULERS, ids=lambda kind: kind.__name__)
def trajectories(request: pytest.FixtureRequest, new_trajectories: NewTrajectories) -> Trajectories:
    return new_trajectories(request.param)


def test_images_and_latents_equal_those_of_the_pipelines_own_call(trajectories: Trajectories) -> None:
    images = own_call(trajectories, SAMPLES, "pt")
    latents = own_call(trajectories, SAMPLES, "latent")
    found = list(trajectories.images(SAMPLES))
    assert torch.equal(torch.stack([image for image, _ in found]), images)
    assert torch.equal(torch.stack([latent for _, latent in found]), latents)
    assert torch.equal(torch.stack(list(trajectories.latents(SAMPLES))), latents)
    assert images.std() > 0.01
    assert not torch.equal(latents[0], latents[1])


def test_a_sample_alone_equals_a_call_with_one_prompt_and_one_generator(trajectories: Trajectories) -> None:
    trajectories.batch = 1
    for sample, (image, latent) in zip(SAMPLES, trajectories.images(SAMPLES), strict=True):
        seeded = {"generator": torch.Generator().manual_seed(sample.seed), **trajectories.call}
        assert torch.equal(image, trajectories.pipe(sample.prompt, output_type="pt", **seeded).images[0])
        seeded["generator"].manual_seed(sample.seed)
        assert torch.equal(latent, trajectories.pipe(sample.prompt, output_type="latent", **seeded).images[0])


def test_the_differentiable_signal_equals_the_one_without_gradients(trajectories: Trajectories) -> None:
    trajectories.batch = 1
    for sample in SAMPLES:
        with_graph = trajectories.differentiable_signal(sample)
        assert with_graph.requires_grad
        assert torch.equal(with_graph.detach()[0], next(trajectories.latents([sample])))


def test_a_sample_does_not_depend_on_others_in_the_same_call(new_trajectories: NewTrajectories) -> None:
    trajectories = new_trajectories(dtype=torch.float64)
    samples = split_samples(["cat", "dog"], 6, seed=0)
    together = list(trajectories.latents(samples))
    alone = [next(trajectories.latents([sample])) for sample in samples]
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_samples_share_calls_and_keep_their_order(
    new_trajectories: NewTrajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectories, calls = new_trajectories(num_inference_steps=1), []
    trajectories.learn(SAMPLES[0])  # takes short runs that must not be counted
    own = type(trajectories.pipe).__call__

    def counted(pipe: Any, **arguments: Any) -> Any:
        calls.append(arguments["prompt"])
        return own(pipe, **arguments)

    monkeypatch.setattr(type(trajectories.pipe), "__call__", counted)
    samples = split_samples(["cat", "dog", "pig"], 6, seed=0)
    assert len(list(trajectories.images(samples))) == 6
    assert calls == [["cat", "dog", "pig", "cat"], ["dog", "pig"]]


@pytest.mark.parametrize("count", [1, 3])
def test_one_negative_prompt_applies_to_every_sample(new_trajectories: NewTrajectories, count: int) -> None:
    with_it = new_trajectories(negative_prompt="blurry")
    found = torch.stack(list(with_it.latents(SAMPLES[:count])))
    without = new_trajectories()
    without.call["negative_prompt"] = ["blurry"] * count
    assert torch.equal(found, own_call(without, SAMPLES[:count], "latent"))
    assert with_it.differentiable_signal(SAMPLES[0]).shape == found[:1].shape


def test_a_pipeline_without_a_latent_output_gives_the_last_sample() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    pipe = DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False))
    trajectories = Trajectories(pipe, ["unet"], {"num_inference_steps": 2})
    ((image, last),) = trajectories.images([SAMPLES[0]])
    assert torch.equal((last / 2 + 0.5).clamp(0, 1), image)
    assert torch.equal(next(trajectories.latents([SAMPLES[0]])), last)


@pytest.mark.parametrize(("scheduler", "expected"), [(DDIMScheduler, 3), (HeunDiscreteScheduler, 5)])
def test_steps_counts_scheduler_steps(new_trajectories: NewTrajectories, scheduler: Any, expected: int) -> None:
    trajectories = new_trajectories(scheduler)
    next(trajectories.latents(SAMPLES[:1]))
    assert trajectories.steps == expected
    list(trajectories.latents(SAMPLES[:1] * 5))  # two calls: of the last run, not of both
    assert trajectories.steps == expected


def test_an_interruption_restores_the_scheduler(new_trajectories: NewTrajectories) -> None:
    trajectories = new_trajectories()
    scheduler = trajectories.pipe.scheduler
    before = dict(vars(scheduler))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = trajectories.pipe.unet.register_forward_pre_hook(stop)
    for run in (trajectories.images, trajectories.latents):
        with pytest.raises(KeyboardInterrupt):
            list(run(SAMPLES))
        assert "step" not in vars(scheduler)
    hook.remove()
    assert set(vars(scheduler)) == set(before)
    assert torch.equal(next(trajectories.latents(SAMPLES[:1])), own_call(trajectories, SAMPLES[:1], "latent")[0])


def test_a_loop_without_a_graph_is_refused(new_trajectories: NewTrajectories) -> None:
    trajectories = new_trajectories()
    for component in trajectories.pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    with pytest.raises(LoopError, match="loop of StableDiffusionPipeline detaches its result"):
        trajectories.differentiable_signal(SAMPLES[0])


def test_an_argument_the_pipeline_does_not_take_is_refused(toy_pipeline: Any) -> None:
    with pytest.raises(BitPolicyError, match="StableDiffusionPipeline does not take heigth"):
        Trajectories(toy_pipeline, ["unet"], {"heigth": 64})


def test_the_denoiser_is_found_and_an_unknown_component_is_refused(toy_pipeline: Any) -> None:
    assert Target.chosen(toy_pipeline).names == Target.chosen(toy_pipeline, ["unet"]).names == ["unet"]
    for wrong in ("scheduler", "transformer", "no such"):
        with pytest.raises(BitPolicyError, match=f"no component '{wrong}'; it has .*unet"):
            Target.chosen(toy_pipeline, [wrong])


def test_samples_cycle_through_prompts_with_different_seeds() -> None:
    samples = split_samples(["a", "b"], 5, seed=10)
    assert [sample.prompt for sample in samples] == ["a", "b", "a", "b", "a"]
    assert [sample.seed for sample in samples] == [10, 11, 12, 13, 14]
