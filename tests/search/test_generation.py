"""Images under a policy: equal to the checkpoint's, compared with the reference, and weights are restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import pack, quantized, to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.search.generation import Generations
from bitpolicy.search.quality.objective import Objective
from bitpolicy.sensitivity.samples import split_samples
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

INT4, INT8 = format_named("int4"), format_named("int8")
SAMPLES = split_samples(["cat", "a red heart", "pizza"], 6, seed=0)  # one call of four and one of two
Choices = dict[str, Choice]


@pytest.fixture(scope="module")
def pipe(new_toy_pipeline: Callable[[], Any]) -> Any:
    pipe = new_toy_pipeline()
    to_storage(pipe.unet, torch.float16)
    return pipe


@pytest.fixture
def trajectories(pipe: Any) -> Trajectories:
    return Trajectories(pipe, ["unet"], {"num_inference_steps": 2})


@pytest.fixture
def calibration(pipe: Any) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {n: 0.1 * torch.randn(m.weight.shape[1:], generator=draw) for n, m in quantizable_layers(pipe.unet)}


@pytest.fixture
def generations(trajectories: Trajectories, calibration: dict[str, torch.Tensor]) -> Generations:
    return Generations(trajectories, quantization=Quantization(calibration=Calibration(calibration)))


@pytest.fixture
def choices(pipe: Any) -> Choices:
    """INT4 and INT8 alternate, and every third bias is corrected."""
    names = [name for name, _ in quantizable_layers(pipe.unet)]
    return {name: Choice((INT4, INT8)[i % 2], i % 3 == 0) for i, name in enumerate(names)}


def bits(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}


def assert_untouched(pipe: Any, before: dict[str, torch.Tensor]) -> None:
    assert [name for name, tensor in pipe.unet.state_dict().items() if not torch.equal(tensor, before[name])] == []


def test_images_are_those_of_the_packed_model(
    generations: Generations,
    choices: Choices,
    calibration: dict[str, torch.Tensor],
    new_toy_pipeline: Callable[[], Any],
) -> None:
    found = generations.images(choices, SAMPLES)
    other = new_toy_pipeline()
    to_storage(other.unet, torch.float16)
    pack(other.unet, choices, quantization=Quantization(calibration=Calibration(calibration)))
    expected = [image for image, _ in Trajectories(other, ["unet"], {"num_inference_steps": 2}).images(SAMPLES)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], generations.references(SAMPLES)[0])


def test_under_int8_compute_images_are_those_of_layers_that_round_their_inputs(
    trajectories: Trajectories,
    generations: Generations,
    choices: Choices,
    calibration: dict[str, torch.Tensor],
    pipe: Any,
) -> None:
    found = Generations(
        trajectories, quantization=Quantization(calibration=Calibration(calibration), compute=Compute.INT8)
    ).images(choices, SAMPLES[:2])
    with quantized(
        pipe.unet, choices, quantization=Quantization(calibration=Calibration(calibration), compute=Compute.INT8)
    ):
        expected = [image for image, _ in trajectories.images(SAMPLES[:2])]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], generations.images(choices, SAMPLES[:2])[0])


def test_errors_are_mean_squares_against_the_reference(generations: Generations, choices: Choices) -> None:
    references = generations.references(SAMPLES)
    images = generations.images(choices, SAMPLES)
    expected = [float((a - b).double().square().mean()) for a, b in zip(images, references, strict=True)]
    assert list(generations.errors(choices, SAMPLES)) == pytest.approx(expected, rel=1e-9)
    assert min(expected) > 0


def test_the_unquantized_policy_has_no_error(generations: Generations, choices: Choices) -> None:
    assert list(generations.errors(dict.fromkeys(choices, Choice(FP16)), SAMPLES)) == [0.0] * len(SAMPLES)


def test_a_reference_is_drawn_once(
    generations: Generations, choices: Choices, trajectories: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    images = trajectories.images

    def counted(samples: Any) -> Any:
        samples = list(samples)
        drawn.extend(samples)
        return images(samples)

    monkeypatch.setattr(trajectories, "images", counted)
    generations.references(SAMPLES[:2])
    generations.references(SAMPLES[:3])
    assert drawn == SAMPLES[:3]
    list(generations.errors(choices, SAMPLES[:3]))
    assert drawn == SAMPLES[:3] * 2  # the policy's images, no references


def test_weights_are_put_back_after_all_errors_were_taken(
    generations: Generations, choices: Choices, pipe: Any
) -> None:
    before = bits(pipe)
    list(generations.errors(choices, SAMPLES))
    assert_untouched(pipe, before)


def test_weights_are_put_back_when_a_loser_is_stopped(generations: Generations, choices: Choices, pipe: Any) -> None:
    before = bits(pipe)
    errors = generations.errors(choices, SAMPLES)
    next(errors)
    with pytest.raises(AssertionError):
        assert_untouched(pipe, before)
    errors.close()
    assert_untouched(pipe, before)


def test_weights_are_put_back_after_an_interruption(
    generations: Generations, choices: Choices, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bits(pipe)
    generations.references(SAMPLES)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.vae, "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        list(generations.errors(choices, SAMPLES))
    assert_untouched(pipe, before)


def test_scores_are_the_objectives_distances_next_to_squared_errors(
    trajectories: Trajectories, calibration: dict[str, torch.Tensor], choices: Choices
) -> None:
    """The objective gets the reference first."""
    quantization = Quantization(calibration=Calibration(calibration))
    signed = Objective("signed", "mean difference", lambda reference, image: float((image - reference).mean()))
    generations = Generations(trajectories, quantization=quantization, objective=signed)
    found = list(generations.scores(choices, SAMPLES))
    images, references = generations.images(choices, SAMPLES), generations.references(SAMPLES)
    expected = [float((image - reference).mean()) for image, reference in zip(images, references, strict=True)]
    assert [score.distance for score in found] == expected
    assert [score.mse for score in found] == list(generations.errors(choices, SAMPLES))
    assert min(score.mse for score in found) > 0
