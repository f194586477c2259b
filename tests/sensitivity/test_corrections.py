"""A layer with huge inputs: the probe's score, the generated images and the export use the same bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitpolicy.kernels.formats.named import parse_formats
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import quantize_layer
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.probes.run import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.samples import split_samples
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

WILD = "mid_block.resnets.0.conv1"
SAMPLES = tuple(split_samples(["a red heart", "pizza"], 2, seed=0))


@pytest.fixture
def wild(new_trajectories: Callable[..., Trajectories]) -> Trajectories:
    """A pipeline whose middle convolution has inputs of 6e4 everywhere, which the norm after it removes."""
    trajectories = new_trajectories(num_inference_steps=2, guidance_scale=1.0)
    resnet = trajectories.pipe.unet.get_submodule("mid_block.resnets.0")
    resnet.norm1.weight.data.zero_()
    resnet.norm1.bias.data.fill_(6e4)
    resnet.conv1.weight.data.mul_(256.0)
    return trajectories


def run(trajectories: Trajectories, probe: str, quantizers: tuple[str, ...], folder: Path) -> ProbeRun:
    many = probe == "ablation"  # a trajectory for each layer, format and sample
    settings = ProbeSettings(probe, SAMPLES[:1] if many else SAMPLES, quantizers=quantizers)
    formats = parse_formats("int4" if many else "int4,int8")
    layers = inventory(trajectories.target)
    return ProbeRun(trajectories, layers, formats, torch.float16, "toy", settings, folder, Stages(quiet=True))


@pytest.mark.parametrize(
    ("probe", "quantizers"),
    [
        ("adjoint", ("rtn",)),
        ("adjoint", ("gptq", "mse")),
        ("stepwise", ("rtn",)),
        ("ablation", ("rtn",)),
        ("weight", ("gptq",)),
    ],
)
def test_a_bias_that_cannot_be_corrected_is_scored_uncorrected_with_a_warning(
    wild: Trajectories, probe: str, quantizers: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probed = run(wild, probe, quantizers, tmp_path)
    reference = probed.reference()
    table = probed.table(reference)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "bias" in line]
    assert line.startswith(f"warning: 1 layer keeps its bias, {WILD}: corrected for the weight's mean error, it would")
    layers = dict(quantizable_layers(wild.target))
    for i, name in enumerate(table.layers):
        for format in table.formats:
            stored = quantize_layer(
                name,
                layers[name],
                table.choice(i, format),
                quantization=Quantization(calibration=reference.calibration),
            )
            assert not stored.left_as_it_was
            assert stored.bias is None or torch.isfinite(stored.bias).all(), name
    place = table.layers.index(WILD), 0
    assert not table.corrected[place]
    assert table.corrected.sum() > 20
    if probe == "adjoint":  # the score belongs to the uncorrected bias, so the measured error is about the same
        plain = replace(table, corrected=torch.zeros_like(table.corrected))
        measured = probed.remeasured(plain, reference, [place])
        assert 0.1 < table.error[place] / measured.error[place] < 10
