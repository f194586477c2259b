"""FP8, MXFP8 and NVFP4 compute in the adjoint probe: the error that rounded inputs cause, and the candidates that have
it."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import pytest
import torch

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP8, MXFP4, NVFP4, format_named
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.rounded_layers import rounds_inputs
from bitpolicy.sensitivity.probes.adjoint import AdjointSketches
from bitpolicy.sensitivity.probes.measurement import References, ablate
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.samples import split_samples
from bitpolicy.sensitivity.sketches.directions import Random
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.reference import ReferencePass
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

NewTrajectories = Callable[..., Trajectories]
INT4, INT8 = format_named("int4"), format_named("int8")
SAMPLES = tuple(split_samples(["a red heart", "pizza", "cat face"], 2, seed=0))
SOME = (
    *(f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{part}" for part in "qkv"),
    *("time_embedding.linear_2", "mid_block.resnets.0.time_emb_proj", "up_blocks.1.resnets.1.conv1", "conv_out"),
)


@pytest.mark.parametrize(
    ("compute", "multiplied"),
    [(Compute.FP8, FP8), (Compute.NVFP4, NVFP4), (Compute.MXFP8, MXFP4)],
    ids=attrgetter("name"),
)
def test_only_formats_that_it_multiplies_have_an_error_from_inputs(
    new_trajectories: NewTrajectories, compute: Compute, multiplied: Format
) -> None:
    trajectories = new_trajectories()

    def of_inputs(*formats: object) -> torch.Tensor | None:
        probe = AdjointSketches(trajectories, candidates(formats), quantization=Quantization(compute=compute))
        (found,) = probe.sketches(SAMPLES[0], [Random(4)])
        return found.inputs

    found = of_inputs(INT4, multiplied, INT8)
    assert found is not None
    assert not found[..., [0, 2]].any()
    layers = [layer for _, layer in quantizable_layers(trajectories.target)]
    exact = torch.tensor([not rounds_inputs(layer, multiplied, compute) for layer in layers])
    assert all(exact[i] for i, layer in enumerate(layers) if layer.weight[0].numel() < 32)
    assert 0 < int(exact.sum()) < len(exact)
    assert torch.equal(found[..., 1].abs().sum(0) == 0, exact)
    assert of_inputs(INT4, INT8) is None


@pytest.mark.parametrize(("compute", "format"), [(Compute.FP8, FP8), (Compute.NVFP4, NVFP4)], ids=attrgetter("name"))
def test_the_predicted_error_with_inputs_agrees_with_the_measured_error(
    new_trajectories: NewTrajectories, compute: Compute, format: Format
) -> None:
    """For single layers. Without the inputs, the prediction would be far too small."""
    trajectories = new_trajectories(num_inference_steps=2, guidance_scale=1.0)
    layers = dict(quantizable_layers(trajectories.target))
    names, some = list(layers), [name for name in SOME if rounds_inputs(layers[name], format, compute)]
    assert len(some) >= 4
    power = ReferencePass.of(trajectories, SAMPLES).latent_power
    probe = AdjointSketches(trajectories, candidates([format]), quantization=Quantization(compute=compute))
    sketches = [s for sample in SAMPLES for s in probe.sketches(sample, [Random(k) for k in range(16)])]
    table = SensitivityTable.from_sketches(names, candidates([format]), sketches, power)
    references = References.of(trajectories, SAMPLES, images=False)

    def measured(name: str, compute: Compute) -> float:
        found = ablate(
            trajectories, {name: Choice(format)}, SAMPLES, references, quantization=Quantization(compute=compute)
        )
        return float(found.power.mean()) / power

    truth = torch.tensor([measured(name, compute) for name in some])
    exact = torch.tensor([measured(name, Compute.EXACT) for name in some])
    predicted = torch.tensor([float(table.error[names.index(name), 0]) for name in some])
    assert 0.7 < (predicted / truth).median() < 1.4
    assert (exact / truth).median() < 0.7
