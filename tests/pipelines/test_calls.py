"""Learning how to call a pipeline: from its signature, from the calls that it refuses and from its outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, ImagePipelineOutput
from diffusers.pipelines.ltx2.pipeline_output import LTX2PipelineOutput
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from toy_pipelines import TOYS

import bitpolicy
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.prompting import default_requests
from bitpolicy.sensitivity.calls.hints import fits, in_words
from bitpolicy.sensitivity.calls.outputs import drawn, latent
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.workflow.plan import default_call

CALL = {"num_inference_steps": 3}
SAMPLES = [Sample("3", 5), Sample("1", 6), Sample("2", 7)]


class Pixels(DDIMPipeline):
    """A loop over DDIM's U-Net. Subclasses take different arguments and return different outputs."""

    def loop(self, generators: Any, shift: Any, steps: int) -> torch.Tensor:
        count = len(generators) if isinstance(generators, list) else 1
        sample = randn_tensor((count, 3, 8, 8), generator=generators) + torch.as_tensor(shift).view(-1, 1, 1, 1)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            sample = self.scheduler.step(self.unet(sample, t).sample, t, sample).prev_sample
        return sample


class NamesItsLatents(Pixels):
    """Refuses unknown output types, but only after drawing."""

    @torch.no_grad()
    def __call__(
        self, batch_size: int = 1, generator: Any = None, num_inference_steps: int = 50, output_type: str = "pil"
    ) -> Any:
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError("as many generators as images, please")
        sample = self.loop(generator, 0.0, num_inference_steps)
        if output_type not in ("np", "pil"):
            raise ValueError(f"{output_type} is not supported")
        image = (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(image if output_type == "np" else self.numpy_to_pil(image))


class TakesTensors(Pixels):
    """Takes labels as a tensor, and returns the image for every output type."""

    @torch.no_grad()
    def __call__(self, labels: Any, generator: Any = None, num_inference_steps: int = 50, output_type: str = "") -> Any:
        sample = self.loop(generator, labels.float() / 10, num_inference_steps)
        return ((sample / 2 + 0.5).clamp(0, 1),)


class TakesOneText(Pixels):
    """Takes a single text, and draws only one image per call."""

    @torch.no_grad()
    def __call__(self, prompt: str, generator: torch.Generator | None = None, num_inference_steps: int = 50) -> Any:
        sample = self.loop(generator, len(prompt.encode()) / 10, num_inference_steps)
        return ImagePipelineOutput(list((sample / 2 + 0.5).clamp(0, 1)))


class DrawsItsOwnNoise(Pixels):
    """Takes no generator."""

    @torch.no_grad()
    def __call__(self, batch_size: int = 1, num_inference_steps: int = 50, output_type: str = "pt") -> Any:
        sample = torch.randn(batch_size, 3, 8, 8)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            sample = self.scheduler.step(self.unet(sample, t).sample, t, sample).prev_sample
        return (sample if output_type == "latent" else (sample / 2 + 0.5).clamp(0, 1),)


class GivesThree(Pixels):
    """Returns three images per sample, as layered pipelines do."""

    @torch.no_grad()
    def __call__(self, batch_size: int = 1, generator: Any = None, num_inference_steps: int = 50) -> Any:
        sample = (self.loop(generator, 0.0, num_inference_steps) / 2 + 0.5).clamp(0, 1)
        return ([image for one in sample for image in (one, one.flip(1), one.flip(2))],)


class MakesSound(Pixels):
    @torch.no_grad()
    def __call__(self, generator: Any = None, num_inference_steps: int = 50, output_type: str = "np") -> Any:
        sample = self.loop(generator, 0.0, num_inference_steps).flatten(2)
        return AudioPipelineOutput(audios=sample.numpy() if output_type == "np" else sample)


class HasASoundTrack(Pixels):
    """Steps a second signal with a copy of its scheduler."""

    @torch.no_grad()
    def __call__(self, generator: Any = None, num_inference_steps: int = 50, output_type: str = "pt") -> Any:
        sample = randn_tensor((1, 3, 8, 8), generator=generator)
        other = torch.zeros(1, 7)
        self.scheduler.set_timesteps(num_inference_steps)
        second = copy.deepcopy(self.scheduler)
        for t in self.scheduler.timesteps:
            sample = self.scheduler.step(self.unet(sample, t).sample, t, sample).prev_sample
            other = second.step(other, t, other).prev_sample
        return ((sample / 2 + 0.5).clamp(0, 1), other)


KINDS = (
    NamesItsLatents,
    TakesTensors,
    TakesOneText,
    DrawsItsOwnNoise,
    GivesThree,
    MakesSound,
    HasASoundTrack,
)


def new_pipe(kind: type[Pixels]) -> Any:
    toy: Any = TOYS["DDIMPipeline"].new()
    pipe = kind(unet=toy.unet, scheduler=toy.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trajectories_of(kind: type[Pixels]) -> Trajectories:
    return Trajectories(new_pipe(kind), ["unet"], CALL)


def as_a_user_calls(pipe: Any, sample: Sample) -> Any:
    """The finished result of one sample, as floats if the pipeline returns them."""
    seeded = torch.Generator().manual_seed(sample.seed)
    named = {
        NamesItsLatents: {"generator": seeded, "output_type": "np"},
        TakesTensors: {"generator": seeded, "labels": torch.tensor([int(sample.prompt)])},
        TakesOneText: {"generator": seeded, "prompt": sample.prompt},
        DrawsItsOwnNoise: {},
        GivesThree: {"generator": seeded},
        MakesSound: {"generator": seeded},
        HasASoundTrack: {"generator": seeded},
    }[type(pipe)]
    with torch.random.fork_rng():
        torch.manual_seed(sample.seed)
        return pipe(**named, **CALL)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_images_equal_those_of_a_users_own_call(kind: type[Pixels]) -> None:
    trajectories = trajectories_of(kind)
    found = [image for image, _ in trajectories.images(SAMPLES)]
    for image, sample in zip(found, SAMPLES, strict=True):
        expected = as_a_user_calls(new_pipe(kind), sample)
        one = torch.stack([torch.as_tensor(part) for part in expected]) if isinstance(expected, list) else expected
        one = torch.as_tensor(one).float()
        one = one.permute(0, 3, 1, 2) if kind is NamesItsLatents else one
        torch.testing.assert_close(image, one if kind is GivesThree else one[0], rtol=1e-4, atol=1e-5)
    assert trajectories.steps == CALL["num_inference_steps"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_signal_is_the_last_sample_with_and_without_a_graph(kind: type[Pixels]) -> None:
    trajectories = trajectories_of(kind)
    for sample in SAMPLES:
        latent = next(trajectories.latents([sample]))
        assert latent.shape == (3, 8, 8)
        again = next(trajectories.latents([sample]))  # by now it is known where to leave the loop
        assert torch.equal(again, latent)
        with_graph = trajectories.differentiable_signal(sample)
        assert with_graph.requires_grad
        torch.testing.assert_close(with_graph.detach()[0], latent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_share_a_call_only_if_they_come_out_the_same_as_alone(kind: type[Pixels]) -> None:
    trajectories = trajectories_of(kind)
    together = list(trajectories.latents(SAMPLES))
    alone_only = (TakesOneText, DrawsItsOwnNoise, HasASoundTrack)
    assert trajectories.batch == (1 if kind in alone_only else 4)
    alone = [next(trajectories_of(kind).latents([sample])) for sample in SAMPLES]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adjoint_probe_works_on_the_whole_loop(kind: type[Pixels], capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"samples": 2, "vectors": 1, "formats": "int8", "quantizer": "rtn", "quiet": True}
    prompts = ["3", "1"] if kind in (TakesTensors, TakesOneText) else None
    table = bitpolicy.probe(new_pipe(kind), call=CALL, prompts=prompts, **asked)
    assert table.probe == "adjoint"
    assert torch.isfinite(table.error).all()
    assert table.error.sum() > 0
    assert capsys.readouterr().err == ""


def test_a_refused_latent_is_not_requested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectories = trajectories_of(NamesItsLatents)
    trajectories.learn(SAMPLES[0])
    asked: list[str] = []
    usual = NamesItsLatents.__call__

    def noted(pipe: Any, **arguments: Any) -> Any:
        asked.append(arguments["output_type"])
        return usual(pipe, **arguments)

    monkeypatch.setattr(NamesItsLatents, "__call__", noted)
    list(trajectories.latents(SAMPLES))
    list(trajectories.images(SAMPLES))
    assert set(asked) == {"np"}


class Refuses(Pixels):
    @torch.no_grad()
    def __call__(self, generator: Any = None, num_inference_steps: int = 50, output_type: str = "pil") -> Any:
        raise RuntimeError("the weather\nis bad")


def test_the_error_for_a_refused_call_quotes_the_pipeline_on_one_line() -> None:
    with pytest.raises(BitPolicyError, match=r"^Refuses refused the call: the weather is bad; ") as error:
        list(trajectories_of(Refuses).images(SAMPLES))
    assert "\n" not in str(error.value)


# Defaults


def test_few_step_models_keep_their_default_number_of_steps() -> None:
    assert default_call(TOYS["ConsistencyModelPipeline"].new(), bundled=False) == {"num_inference_steps": 1}
    assert default_call(TOYS["StableDiffusionPipeline"].new(), bundled=False) == {"num_inference_steps": 20}
    toy: Any = TOYS["DDIMPipeline"].new()
    assert default_call(FixedSteps(unet=toy.unet, scheduler=toy.scheduler), bundled=False) == {}


class FixedSteps(Pixels):
    def __call__(self, generator: Any = None) -> Any:
        return ()


def test_class_labels_are_requested_only_if_the_denoiser_has_classes() -> None:
    toy = TOYS["ConsistencyModelPipeline"]
    assert len(default_requests(toy.new(), bundled=False)) == 32
    pipe = toy.new()
    pipe.unet.register_to_config(num_class_embeds=None)
    assert default_requests(pipe, bundled=False) == [""]


# Outputs


def test_every_kind_of_output_becomes_one_tensor_per_sample() -> None:
    image = torch.rand(2, 3, 4, 5)
    last = image.permute(0, 2, 3, 1).numpy()
    eight_bits = [Image.fromarray((one * 255).round().astype(np.uint8)) for one in last]
    for found in (image, last, list(image), list(last), eight_bits):
        torch.testing.assert_close(torch.stack(drawn(found, 2)), image, rtol=0, atol=0.002)
    assert [one.shape for one in drawn([eight_bits, eight_bits], 2)] == [(2, 3, 4, 5)] * 2  # two videos of two frames
    assert [one.shape for one in drawn(last[..., :1], 2)] == [(1, 4, 5)] * 2
    assert [one.shape for one in drawn(np.zeros((2, 1, 50)), 2)] == [(1, 50)] * 2  # sound
    assert [one.shape for one in drawn(torch.rand(4, 3, 4, 5), 2)] == [(2, 3, 4, 5)] * 2  # two images each
    assert drawn(Image.new("L", (5, 4), 255), 1)[0].eq(1).all()


def test_the_latents_of_a_video_and_its_sound_track_count_the_same() -> None:
    """Each part of the joined latent has the mean square of its values as squared norm, whatever its size."""
    video, sound = torch.randn(2, 4, 3, 5, 6), torch.randn(2, 7, 8)
    joined = latent(LTX2PipelineOutput(frames=video, audio=sound))
    assert joined.shape == (2, 4 * 3 * 5 * 6 + 7 * 8)
    power = video.square().flatten(1).mean(1) + sound.square().flatten(1).mean(1)
    torch.testing.assert_close(joined.square().sum(1), power)
    assert latent(LTX2PipelineOutput(frames=video, audio=None)) is video
    assert latent((video,)) is video


def test_results_that_cannot_be_divided_among_samples_are_refused() -> None:
    with pytest.raises(BitPolicyError, match=r"2 samples .* 3 results"):
        drawn(torch.zeros(3, 3, 4, 5), 2)


# Types


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (5, int, True),
        (5.0, int, False),
        (True, int, False),
        ("5", int, False),
        (5, float, True),
        (True, float, False),
        ("abc", float, False),
        (True, bool, True),
        (1, bool, False),
        ("a", str, True),
        (1, str, False),
        (None, int | None, True),
        (None, int, False),
        ("abc", int | None, False),
        ([1, 2], list[int], True),
        ([1, 2.5], list[int], False),
        ([1, 2.5], list[float], True),
        ("ab", list[str], False),
        ("ab", str | list[str], True),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ([1, 2, 3], tuple[int, ...], True),
        ([1, 2], Sequence[int], True),
        (1, list, False),
        ({"a": 1}, dict[str, Any], True),
        ("a", dict[str, Any], False),
        ("fast", Literal["fast", "good"], True),
        ("bad", Literal["fast", "good"], False),
        ("anything", Any, True),
        ("anything", torch.Tensor, True),
        (torch.zeros(1), int, True),
    ],
)
def test_a_value_is_checked_against_a_hint(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected


def test_type_hints_are_described_in_words() -> None:
    assert in_words(int | None) == "an integer"
    assert in_words(str | list[str]) == "a string, or a list, each item a string"
    assert in_words(tuple[int, int] | None) == "a list of 2: an integer, an integer"


WRONG = [
    ("height", "abc", "an integer"),
    ("height", 16.5, "an integer"),
    ("guidance_scale", "high", "a number"),
    ("num_inference_steps", "20", "an integer"),
    ("timesteps", 5, "a list"),
    ("cross_attention_kwargs", [1], "a mapping"),
    ("negative_prompt", 5, "a string"),
]


@pytest.mark.parametrize(("name", "value", "needed"), WRONG)
def test_a_value_of_a_wrong_type_is_refused_before_work_begins(name: str, value: Any, needed: str) -> None:
    toy = TOYS["StableDiffusionPipeline"]
    said = rf"^{name} is {value!r}; StableDiffusionPipeline needs {needed}".replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(BitPolicyError, match=said):
        bitpolicy.probe(toy.new(), call={**toy.call, name: value}, quiet=True)
    with pytest.raises(BitPolicyError, match=said):
        bitpolicy.probe(toy.new(), call=toy.call, prompts=[{"prompt": "a"}, {"prompt": "b", name: value}], quiet=True)


# Arguments without effect


def probe_with(capsys: pytest.CaptureFixture[str], **call: Any) -> str:
    """The output on stderr."""
    asked: dict[str, Any] = {"samples": 1, "vectors": 1, "formats": "int8", "quantizer": "rtn", "quiet": True}
    pipe = TOYS["StableDiffusionPipeline"].new()
    bitpolicy.probe(pipe, call={"num_inference_steps": 3, **call}, prompts=["a cat"], **asked)
    return capsys.readouterr().err


def test_an_argument_without_effect_gives_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    said = probe_with(capsys, height=32)  # Stable Diffusion takes both or none
    assert said.startswith("warning: the call argument height=32 changes nothing: the images are the same without it")
    assert said.count("\n") == 1


def test_the_warning_names_only_the_argument_without_effect(capsys: pytest.CaptureFixture[str]) -> None:
    said = probe_with(capsys, eta=0.5, negative_prompt="blurry", guidance_scale=3.0)  # eta is DDIM's, this is PNDM
    assert said.startswith("warning: the call argument eta=0.5 changes nothing")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "call", [{"height": 32, "width": 16}, {"height": 16, "width": 16}, {"eta": 0.0}, {"negative_prompt": "blurry"}]
)
def test_arguments_with_an_effect_or_their_usual_value_give_no_warning(
    capsys: pytest.CaptureFixture[str], call: dict[str, Any]
) -> None:
    assert probe_with(capsys, **call) == ""


def test_arguments_are_tested_for_an_effect_only_if_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trajectories, "without_effect", lambda *_: pytest.fail("a run was made"))
    toy = TOYS["StableDiffusionPipeline"]
    call = {"num_inference_steps": 2, "guidance_scale": 3.0}
    bitpolicy.probe(toy.new(), call=call, prompts=["a cat"], samples=1, vectors=1, formats="int8", quiet=True)
