"""Every pipeline class: the adjoint probe against finite differences and ablation, and the steps to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from toy_pipelines import TOYS, every

import bitpolicy
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.pipelines.prompting import split
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.probes.adjoint import AdjointSketches
from bitpolicy.sensitivity.probes.measurement import References, ablate
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches.directions import Random
from bitpolicy.sensitivity.sketches.sketch import Sketch
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.reference import ReferencePass

INT4, INT8 = format_named("int4"), format_named("int8")
FORMATS = (INT4, INT8)
VECTOR = 4
ACCURACY = 5e-6  # sketches are kept in float32
every_toy = pytest.fixture(scope="module", params=every(TOYS))


# The sketch against finite differences


@dataclass(frozen=True)
class Sketched:
    """A toy in float64, a mean input for each layer, and the sketch along one probe vector."""

    subject: Any
    means: dict[str, torch.Tensor]
    sketch: Sketch

    def signed(self, part: str, column: int, signs: torch.Tensor) -> dict[Any, torch.Tensor]:
        """The change of every layer's weight or bias by a format, negated where the sign is -1."""
        found = {}
        for sign, (name, layer) in zip(signs.tolist(), self.subject.layers.items(), strict=True):
            if part == "weight":
                found[layer.weight] = sign * self.subject.weight_change(name, FORMATS[column])
            elif layer.bias is not None:
                found[layer.bias] = sign * self.subject.bias_change(name, FORMATS[column], self.means[name])
        return found

    def slope(self, moves: dict[Any, torch.Tensor], step: int | None = None) -> float:
        with self.subject.unrounded():
            return self.subject.slope(moves, VECTOR, step)


@every_toy
def sketched(request: Any, new_subject: Any, made_up_means: Any) -> Sketched:
    steps = 2 if "num_frames" in TOYS[request.param].call else 3
    subject = new_subject(request.param, torch.float64, num_inference_steps=steps)
    means = made_up_means(subject)
    with subject.unrounded():
        probe = AdjointSketches(
            subject.trajectories, candidates(FORMATS), quantization=Quantization(calibration=Calibration(means))
        )
        (sketch,) = probe.sketches(subject.samples[0], [Random(VECTOR)])
    return Sketched(subject, means, sketch)


def random_signs(count: int, seed: int) -> torch.Tensor:
    return torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_all_layers_together_have_the_slope_that_finite_differences_find(sketched: Sketched, part: str) -> None:
    """Signs are random, so that a missing or misplaced layer cannot go unnoticed."""
    found = getattr(sketched.sketch, part).double().sum(0)
    column = {"weight": 0, "bias": 1}[part]
    signs = random_signs(len(found), seed=1)
    expected = sketched.slope(sketched.signed(part, column, signs))
    of_layers = found[:, column]
    assert float(of_layers @ signs) == pytest.approx(expected, abs=ACCURACY * float(of_layers.norm()))


def test_one_layer_of_each_role_has_the_slope_that_finite_differences_find(sketched: Sketched) -> None:
    found = sketched.sketch.weight.double().sum(0)[:, 0]
    by_role = {layer.role: i for i, layer in enumerate(inventory(sketched.subject.trajectories.target))}
    for role, place in by_role.items():
        name, layer = list(sketched.subject.layers.items())[place]
        expected = sketched.slope({layer.weight: sketched.subject.weight_change(name, INT4)})
        tolerance = ACCURACY * float(found.norm()) / 10
        assert float(found[place]) == pytest.approx(expected, rel=ACCURACY, abs=tolerance), (role, name)


def test_each_scheduler_step_has_the_slope_of_moving_weights_in_that_step_alone(sketched: Sketched) -> None:
    weight = sketched.sketch.weight.double()[..., 0]
    with sketched.subject.unrounded():
        steps = sketched.subject.steps_taken(sketched.subject.samples[0])
    assert len(weight) == len(sketched.sketch.bias) == steps
    signs = random_signs(weight.shape[1], seed=2)
    for step in range(steps):
        expected = sketched.slope(sketched.signed("weight", 0, signs), step)
        assert float(weight[step] @ signs) == pytest.approx(expected, abs=ACCURACY * float(weight.norm())), step


# Its images and latents, and the mean inputs of its layers


@every_toy
def subject(request: Any, new_subject: Any) -> Any:
    return new_subject(request.param, num_inference_steps=2)


def channels_first(images: Any) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2) if not isinstance(images, torch.Tensor) else images


def test_images_and_latents_equal_those_of_the_pipelines_own_call(subject: Any) -> None:
    trajectories, sample = subject.trajectories, subject.samples[0]
    latent = subject.final_latent(sample)
    assert torch.equal(next(trajectories.latents([sample]))[None], latent)
    ((image, last),) = trajectories.images([sample])
    assert torch.equal(image[None], channels_first(subject.own_call(sample, "pt")))
    assert image.shape[-3] == (1 if subject.toy.name == "ConsistencyModelPipeline" else 3)
    frames_first = subject.toy.name == "TextToVideoSDPipeline"  # the last step's sample, as its scheduler has it
    assert torch.equal(last, latent[0].transpose(0, 1) if frames_first else latent[0])


def test_the_differentiable_signal_equals_the_one_without_gradients(subject: Any) -> None:
    sample = subject.samples[0]
    latent = subject.trajectories.differentiable_signal(sample)
    assert latent.requires_grad
    torch.testing.assert_close(latent.detach(), subject.final_latent(sample), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [2, 3])
def test_samples_that_share_a_call_equal_those_alone(subject: Any, count: int) -> None:
    trajectories = subject.trajectories
    alone = torch.stack([subject.final_latent(sample)[0] for sample in subject.samples[:count]])
    together = torch.stack(list(trajectories.latents(subject.samples[:count])))
    error = (together - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1)
    assert error.max() < 1e-4
    assert trajectories.batch in (1, 4)


def mean_patch_by_gradient(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The mean input of a weight, computed as the gradient of the mean output."""
    weight = torch.zeros_like(layer.weight, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        linear = isinstance(layer, torch.nn.Linear)
        y = torch.nn.functional.linear(x, weight) if linear else layer._conv_forward(x, weight, None)
        (y.sum() / y.numel() * len(weight)).backward()
    assert weight.grad is not None
    one_output_a_group = weight.grad.unflatten(0, (getattr(layer, "groups", 1), -1))[:, 0]
    return one_output_a_group.flatten(0, 1)


def test_the_calibration_is_the_mean_input_of_every_called_layer(subject: Any) -> None:
    sample, seen, calls = subject.samples[0], {}, []

    def look(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, kwargs: Any, _: Any) -> None:
            x = (args[0] if args else kwargs["input"]).double()
            seen.setdefault(name, []).append((mean_patch_by_gradient(layer, x), len(x)))

        return hook

    hooks = [layer.register_forward_hook(look(name), with_kwargs=True) for name, layer in subject.layers.items()]
    hooks += [model.register_forward_hook(lambda *_: calls.append(1)) for model in subject.trajectories.denoisers]
    subject.final_latent(sample)
    for hook in hooks:
        hook.remove()
    found = ReferencePass.of(subject.trajectories, [sample])
    assert found.calls == len(calls)
    assert sorted(found.calibration.input_means) == sorted(seen)
    for name, inputs in seen.items():
        expected = sum(mean * rows for mean, rows in inputs) / sum(rows for _, rows in inputs)
        error = (found.calibration.input_means[name] - expected).abs().max() / (expected.abs().max() + 1e-3)
        assert error < 1e-5, name


# From a prompt to a checkpoint


@dataclass(frozen=True)
class Probed:
    """A toy with its table from `bitpolicy.probe`, and the ablation of some layers."""

    subject: Any
    samples: tuple[Sample, ...]
    table: SensitivityTable


def requests(subject: Any) -> list[Any] | None:
    """What a user would give as `prompts`; None if the pipeline takes no requests."""
    if subject.toy.extra:
        return [{**({"prompt": s.prompt} if s.prompt else {}), **s.arguments} for s in subject.samples]
    return None if subject.toy.takes == "nothing" else [s.prompt for s in subject.samples]


@every_toy
def probed(request: Any, new_subject: Any) -> Probed:
    subject = new_subject(request.param, num_inference_steps=2)
    asked = requests(subject)
    options: dict[str, Any] = {"samples": 2, "vectors": 6, "quantizer": "rtn", "quiet": True}
    table = bitpolicy.probe(subject.pipe, call=subject.call, prompts=asked, **options)
    drawn = split(asked or [""], 0, calibration=2, search=1, confirm=1, held_out=1).calibration
    return Probed(subject, drawn, table)


def test_every_layer_has_a_finite_score_and_int8_harms_less_than_int4(probed: Probed) -> None:
    table = probed.table
    assert table.probe == "adjoint"
    assert list(table.layers) == list(probed.subject.layers)
    assert table.formats == FORMATS
    assert torch.isfinite(table.error).all()
    assert (table.error >= 0).all()
    total = table.error.sum(0)
    assert 0 < total[1] < total[0] / 10


def test_scores_agree_with_ablation_in_rank_and_size(probed: Probed) -> None:
    subject, table = probed.subject, probed.table
    calibration = ReferencePass.of(subject.trajectories, probed.samples)
    references = References.of(subject.trajectories, probed.samples, images=False)
    chosen = torch.linspace(0, len(table.layers) - 1, 12).round().int().tolist()
    measured = []
    for place in chosen:
        choices = {table.layers[place]: Choice(INT4, bool(table.corrected[place, 0]))}
        quantization = Quantization(calibration=calibration.calibration)
        found = ablate(subject.trajectories, choices, probed.samples, references, quantization=quantization)
        measured.append(float(found.power.mean()))
    power = torch.stack([subject.final_latent(sample) for sample in probed.samples]).double().square().sum()
    truth, predicted = torch.tensor(measured) / (power / len(probed.samples)), table.error[chosen, 0]
    felt = truth > 1e-9
    assert felt.sum() >= 8
    assert spearmanr(predicted[felt], truth[felt]).statistic > 0.8
    assert 1 / 3 < (predicted[felt] / truth[felt]).median() < 3
    assert (predicted[~felt] < 1e-7).all()


def test_a_layer_that_is_never_called_has_no_bias_correction(probed: Probed) -> None:
    """Hunyuan-DiT passes its pooler's projections to a fused attention, which only uses their weights."""
    called = ReferencePass.of(probed.subject.trajectories, probed.samples[:1]).calibration.input_means
    silent = [i for i, name in enumerate(probed.table.layers) if name not in called]
    assert bool(silent) == (probed.subject.toy.name == "HunyuanDiTPipeline")
    assert not probed.table.corrected[silent].any()


ROADS = every(  # a class of denoiser each
    [
        "DDIMPipeline",
        "StableDiffusionPipeline",
        "DiTPipeline",
        "PixArtSigmaPipeline",
        "SanaPipeline",
        "HunyuanDiTPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "AnimateDiffPipeline",
        "CogVideoXPipeline",
        "WanPipeline-2.2",
    ]
)


@pytest.fixture(scope="module", params=ROADS)
def searched(request: Any, new_subject: Any) -> tuple[Any, Policy]:
    subject = new_subject(request.param, num_inference_steps=2)
    sizes = {"calibration_samples": 1, "vectors": 1, "trials": 0}
    budget = "85%" if subject.toy.name == "DiTPipeline" else "45%"  # its class embeddings stay as they are
    policy = bitpolicy.search(subject.pipe, budget, call=subject.call, prompts=requests(subject), quiet=True, **sizes)
    return subject, policy


def test_the_reloaded_checkpoint_draws_the_same_as_the_policy_in_memory(
    searched: tuple[Any, Policy], tmp_path: Path
) -> None:
    subject, policy = searched
    target, sample = subject.trajectories.target, subject.samples[1]
    assert policy.calibration is not None
    choices = policy.resolve(subject.layers)
    assert len({choice.format for choice in choices.values()}) > 1
    nbytes = bitpolicy.export(subject.pipe, policy, tmp_path / "checkpoint", component_dtype=torch.float32)
    assert policy.result is not None
    assert nbytes == policy.result.policy_bytes <= policy.budget.bytes
    plain = channels_first(subject.own_call(sample, "pt"))
    with quantized(target, choices, quantization=Quantization(calibration=policy.calibration)):
        expected = channels_first(subject.own_call(sample, "pt"))
    assert not torch.equal(expected, plain)
    reloaded = replace(subject, pipe=bitpolicy.load_pipeline(tmp_path / "checkpoint", torch.float32))
    assert torch.equal(channels_first(reloaded.own_call(sample, "pt")), expected)
