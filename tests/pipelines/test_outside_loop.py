"""Text encoders and autoencoders in addition to the denoiser: scores against finite differences and ablation.

If an autoencoder is studied, the scores are compared with the image that the pipeline itself returns, after its own
denormalization and clamp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from scipy.stats import spearmanr

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.probes.adjoint import AdjointSketches
from bitpolicy.sensitivity.probes.measurement import References, ablate
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches.directions import Random
from bitpolicy.sensitivity.sketches.probe_memory import BY_STEP, ProbeMemory
from bitpolicy.sensitivity.sketches.sketch import Sketch
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.reference import ReferencePass

INT4, INT8 = format_named("int4"), format_named("int8")
VECTOR, ACCURACY = 4, 5e-6
STUDIED = [  # pipeline, components
    ("StableDiffusionPipeline", "unet,text_encoder"),
    ("StableDiffusionPipeline", "unet,text_encoder,vae"),
    ("StableDiffusionPipeline", "text_encoder"),
    ("StableDiffusionPipeline", "vae"),
    ("StableDiffusionXLPipeline", "all"),
    ("StableDiffusion3Pipeline", "all"),
    ("FluxPipeline", "text_encoder,text_encoder_2"),
    ("PixArtSigmaPipeline", "all"),
    ("HunyuanDiTPipeline", "all"),
    ("DiTPipeline", "all"),
    ("StableDiffusionImg2ImgPipeline", "all"),
    ("StableVideoDiffusionPipeline", "all"),
    ("WanPipeline-2.2", "transformer,text_encoder"),
]


@dataclass(frozen=True)
class Sketched:
    """A toy in float64, a mean input for each layer, and the sketch along one probe vector."""

    subject: Any
    means: dict[str, torch.Tensor]
    sketch: Sketch

    @property
    def owners(self) -> list[str]:
        """The component of each layer outside the loop; empty for layers of a denoiser."""
        outside = self.subject.trajectories.outside_layers
        return [outside.get(name, "") for name in self.subject.layers]

    def slope(self, moves: dict[Any, torch.Tensor]) -> float:
        with self.subject.unrounded():
            return self.subject.slope(moves, VECTOR)


@pytest.fixture(scope="module", params=STUDIED, ids=lambda studied: "-".join(studied))
def sketched(request: Any, new_subject: Any, made_up_means: Any) -> Sketched:
    name, components = request.param
    subject = new_subject(name, torch.float64, components=components, num_inference_steps=2)
    means = made_up_means(subject)
    with subject.unrounded():
        probe = AdjointSketches(
            subject.trajectories, candidates([INT4]), quantization=Quantization(calibration=Calibration(means))
        )
        first, _ = probe.sketches(subject.samples[0], [Random(VECTOR), Random(VECTOR + 1)])  # two from one graph
    return Sketched(subject, means, first)


def random_signs(count: int) -> list[float]:
    return (torch.randint(2, (count,), generator=torch.Generator().manual_seed(3)).double() * 2 - 1).tolist()


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_all_layers_together_have_the_slope_that_finite_differences_find(sketched: Sketched, part: str) -> None:
    found = getattr(sketched.sketch, part).double().sum(0)[:, 0]
    signs, moves = random_signs(len(found)), {}
    for sign, (name, layer) in zip(signs, sketched.subject.layers.items(), strict=True):
        if part == "weight":
            moves[layer.weight] = sign * sketched.subject.weight_change(name, INT4)
        elif layer.bias is not None:
            moves[layer.bias] = sign * sketched.subject.bias_change(name, INT4, sketched.means[name])
    expected = sketched.slope(moves)
    assert float(found @ torch.tensor(signs).double()) == pytest.approx(expected, abs=ACCURACY * float(found.norm()))


def test_a_layer_of_each_role_of_each_component_has_the_slope_that_finite_differences_find(sketched: Sketched) -> None:
    found = sketched.sketch.weight.double().sum(0)[:, 0]
    layers = inventory(sketched.subject.trajectories.target)
    places = {(owner, layer.role): i for i, (owner, layer) in enumerate(zip(sketched.owners, layers, strict=True))}
    for (owner, role), place in places.items():
        if not owner:
            continue  # denoisers have tests of their own
        name, layer = list(sketched.subject.layers.items())[place]
        expected = sketched.slope({layer.weight: sketched.subject.weight_change(name, INT4)})
        tolerance = ACCURACY * float(found.norm()) / 10
        assert float(found[place]) == pytest.approx(expected, rel=ACCURACY, abs=tolerance), (owner, role, name)


def test_models_outside_the_loop_have_a_separate_row(sketched: Sketched) -> None:
    reached = sketched.sketch.weight.abs().amax(2) > 0
    outside = torch.tensor([bool(owner) for owner in sketched.owners])
    assert not reached[1:, outside].any()
    assert not reached[0, ~outside].any()
    assert {owner for i, owner in enumerate(sketched.owners) if reached[0, i]} == set(
        sketched.subject.trajectories.outside
    )


def test_models_are_restored(sketched: Sketched) -> None:
    for model in sketched.subject.pipe.components.values():
        if isinstance(model, torch.nn.Module):
            assert not {"forward", "decode"} & set(vars(model))
            assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


# Against ablation


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "PixArtSigmaPipeline"])
def test_scores_agree_with_ablation_in_rank_and_size(name: str, new_subject: Any) -> None:
    subject = new_subject(name, components="all", num_inference_steps=3)
    trajectories, samples = subject.trajectories, subject.samples[:2]
    reference = ReferencePass.of(trajectories, samples)
    probe = AdjointSketches(trajectories, candidates([INT8]), quantization=Quantization())
    found = [s for sample in samples for s in probe.sketches(sample, [Random(k) for k in range(12)])]
    table = SensitivityTable.from_sketches(list(subject.layers), candidates([INT8]), found, reference.latent_power)
    images = References.of(trajectories, samples, images=False)
    outside = [i for i, layer in enumerate(subject.layers) if layer in trajectories.outside_layers][::2]
    kept = [i for i in outside if float(table.error[i, 0]) > 0]
    truth = []
    for place in kept:
        choice = {table.layers[place]: Choice(INT8)}
        measured = ablate(trajectories, choice, samples, images, quantization=Quantization())
        truth.append(float(measured.power.mean()) / reference.latent_power)
    predicted = table.error[kept, 0]
    ratio = (predicted / torch.tensor(truth)).median()
    assert len(kept) > 15
    assert spearmanr(predicted, truth).statistic > 0.9
    assert 0.7 < float(ratio) < 1.4


def test_a_sketch_of_the_whole_has_the_layers_outside_the_loop_too(new_subject: Any) -> None:
    subject = new_subject("StableDiffusionPipeline", components="all", num_inference_steps=2)
    steps, whole = (
        next(
            AdjointSketches(
                subject.trajectories, candidates([INT4]), quantization=Quantization(), memory=memory
            ).sketches(subject.samples[0], [Random(0)])
        ).weight
        for memory in (BY_STEP, ProbeMemory.summing(subject.trajectories.target.layers, 2**40))
    )
    assert len(steps) == 1 + subject.trajectories.steps
    assert steps[0].any()
    torch.testing.assert_close(whole, steps.sum(0, keepdim=True), rtol=1e-5, atol=1e-6 * float(steps.abs().max()))


# Precision, and pipelines that encode without gradients


def test_a_decoder_that_is_upcast_agrees_with_full_precision(new_subject: Any) -> None:
    """SDXL casts its autoencoder to float32 for decoding and back, before the backward pass."""
    sketches = []
    for dtype in (torch.float32, torch.float16):
        subject = new_subject("StableDiffusionXLPipeline", dtype, components="all", num_inference_steps=2)
        assert subject.pipe.vae.config.force_upcast
        probe = AdjointSketches(subject.trajectories, candidates([INT4]), quantization=Quantization())
        sketches.append(next(iter(probe.sketches(subject.samples[0], [Random(0)]))).weight.sum(0))
        assert {p.dtype for p in subject.pipe.vae.parameters()} == {dtype}
    error = (sketches[1] - sketches[0]).norm() / sketches[0].norm()
    assert error < 0.03


def probe_of(subject: Any) -> AdjointSketches:
    return AdjointSketches(subject.trajectories, candidates([INT4]), quantization=Quantization())


def test_a_decorated_encode_prompt_passes_gradients(new_subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in DeepFloyd IF and Kandinsky 3."""
    subject = new_subject("StableDiffusionPipeline", components="unet,text_encoder", num_inference_steps=2)
    (expected,) = probe_of(subject).sketches(subject.samples[0], [Random(0)])
    kind = diffusers.StableDiffusionPipeline
    monkeypatch.setattr(kind, "encode_prompt", torch.no_grad()(kind.encode_prompt))
    (found,) = probe_of(subject).sketches(subject.samples[0], [Random(0)])
    assert torch.equal(found.weight, expected.weight)
    assert "encode_prompt" not in vars(subject.pipe)


def test_an_encoder_that_runs_without_gradients_is_refused_by_name(
    new_subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = new_subject("StableDiffusionPipeline", components="unet,text_encoder", num_inference_steps=2)
    usual = diffusers.StableDiffusionPipeline.encode_prompt

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return usual(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "encode_prompt", encode_prompt)
    with pytest.raises(BitPolicyError, match=r"no gradient .* text_encoder; leave text_encoder out of"):
        next(iter(probe_of(subject).sketches(subject.samples[0], [Random(0)])))


def test_mean_inputs_are_known_for_the_decoder_and_not_for_the_encoder(new_subject: Any) -> None:
    subject = new_subject("StableDiffusionPipeline", components="unet,text_encoder,vae", num_inference_steps=2)
    found = ReferencePass.of(subject.trajectories, subject.samples)
    missing = {layer for layer in subject.layers if layer not in found.calibration.input_means}
    encoder = {layer for layer in subject.layers if layer.startswith(("vae.encoder.", "vae.quant_conv"))}
    assert missing == encoder
    assert encoder
    images = torch.stack([subject.image(sample)[0] for sample in subject.samples]).double()
    assert found.latent_power == pytest.approx(float(images.square().flatten(1).sum(1).mean()), rel=1e-5)


def test_given_prompt_embeddings_leave_the_encoder_uncalled(new_subject: Any) -> None:
    subject = new_subject("StableDiffusionPipeline", components="unet,text_encoder", num_inference_steps=2)
    prompt, negative = subject.pipe.encode_prompt("a cat", "cpu", 1, True)
    sample = Sample("", 5, {"prompt_embeds": prompt.detach(), "negative_prompt_embeds": negative.detach()})
    (found,) = probe_of(subject).sketches(sample, [Random(0)])
    assert not found.weight[0].any()
    assert found.weight[1:].any()
