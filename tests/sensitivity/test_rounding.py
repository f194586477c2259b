"""Rounding of every layer by every quantizer, once and in parts, and its use in scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import format_named, parse_formats
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.kernels.quantizers.bias_correction import bias_shift
from bitpolicy.kernels.quantizers.gptq import Curvature, gptq
from bitpolicy.kernels.quantizers.named import QUANTIZERS, quantize_data_free
from bitpolicy.kernels.quantizers.range_search import mse
from bitpolicy.policies.apply import quantize_layer, quantized, stored_weight
from bitpolicy.policies.calibration import Calibration, RoundedKey, RoundedWeights
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.probes.run import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.rounding import hessians, rounding, rounding_pass
from bitpolicy.sensitivity.rounding.candidates import Candidate, candidates
from bitpolicy.sensitivity.rounding.hessians import Moments, measure_moments
from bitpolicy.sensitivity.rounding.kept_rounding import write_rounded
from bitpolicy.sensitivity.rounding.rounding import announced, needs_hessian, parts, rounded
from bitpolicy.sensitivity.samples import split_samples
from bitpolicy.sensitivity.sketches.weight_changes import WeightChanges
from bitpolicy.sensitivity.trajectory import scaled_backward
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

NewTrajectories = Callable[..., Trajectories]
F16 = torch.float16
INT4, INT8, ROTATED = (format_named(name) for name in ("int4", "int8", "int3-g32-rot"))
SAMPLES = tuple(split_samples(["a red heart", "pizza"], 2, seed=0))
AUTO = ProbeSettings("adjoint", SAMPLES, vectors=2, quantizers=QUANTIZERS)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return found.keys() == expected.keys() and all(
        found[key].dtype == expected[key].dtype
        and torch.equal(found[key].view(torch.uint8), expected[key].view(torch.uint8))
        for key in expected
    )


def of(found: RoundedWeights, name: str, candidate: Candidate) -> dict[str, torch.Tensor]:
    """The rounded tensors of one candidate, by suffix."""
    rounding = (name, candidate.format.name, candidate.quantizer)
    return {key.suffix: found[key] for key in found if key[:3] == rounding}


def moments(length: int, seed: int = 0) -> Moments:
    draw = torch.Generator().manual_seed(seed)
    x, power = torch.randn(300, length, generator=draw) @ torch.randn(length, length, generator=draw), torch.rand(300)
    return Moments((x.T @ x)[None, None], ((x * power[:, None]).T @ x)[None, None])


# Parts


@pytest.mark.parametrize("memory", [1, 10_000, 1_000_000, 2**30])
@pytest.mark.parametrize("quantizers", [("rtn", "mse"), ("gptq",), QUANTIZERS], ids="+".join)
def test_parts_contain_every_layer_once_in_order_and_fit_in_memory(
    toy_unet: Any, monkeypatch: pytest.MonkeyPatch, memory: int, quantizers: tuple[str, ...]
) -> None:
    monkeypatch.setattr(rounding, "_MEMORY", memory)
    monkeypatch.setattr(torch.Tensor, "nbytes", property(lambda _: 0))  # as of a small model
    layers = dict(quantizable_layers(toy_unet))
    found = parts(layers, quantizers)
    assert [name for part in found for name in part] == list(layers)
    if {"gptq", "gptq-trajectory"} & set(quantizers):
        sums = 2 if "gptq-trajectory" in quantizers else 1
        held = [sum(sums * 4 * layers[name].weight[0].numel() ** 2 for name in part) for part in found]
        assert all(nbytes <= memory or len(part) == 1 for nbytes, part in zip(held, found, strict=True))
    assert len(found) == 1 if memory == 2**30 else len(found) >= 1
    assert all(found)


@pytest.mark.parametrize(
    ("quantizers", "needs"),
    [(("rtn", "mse", "hqq"), False), (("rtn", "gptq"), True), (("gptq-trajectory",), True)],
    ids=["data-free", "gptq", "trajectory"],
)
def test_only_some_quantizers_need_a_hessian(quantizers: tuple[str, ...], needs: bool) -> None:
    assert needs_hessian(quantizers) is needs


# One layer


@pytest.mark.parametrize(
    "format", [INT4, INT8, ROTATED, format_named("nf4"), format_named("fp8")], ids=lambda f: f.name
)
def test_each_candidate_gets_the_result_of_its_quantizer(format: Any) -> None:
    weight, seen = torch.randn(6, 64).pow(3).half(), moments(64)
    found = dict(rounded("mid.to_q", weight, candidates([format], QUANTIZERS), seen))
    (steady,), (trajectory,) = seen.inputs.flatten(0, 1), seen.seen.flatten(0, 1)
    steady = steady / steady.diagonal().mean()
    trajectory = steady + trajectory / trajectory.diagonal().mean()
    expected = {
        "mse": quantize_data_free("mse", format, weight),
        "hqq": quantize_data_free("hqq", format, weight),
        "gptq": gptq(format, weight, Curvature.of(format.rotated_hessian(steady))),
        "gptq-trajectory": gptq(format, weight, Curvature.of(format.rotated_hessian(trajectory))),
    }
    for quantizer, tensors in expected.items():
        assert same(of(found, "mid.to_q", Candidate(format, quantizer)), tensors), quantizer
    assert len(found) == 4 * len(format.tensors(weight.shape, F16)), "round to nearest needs no keeping"


def test_formats_share_a_hessian_only_if_they_have_the_same_rotation() -> None:
    formats = [format_named(n) for n in ("int4", "int4-rot", "int4-g32-rot", "int3-rot", "int4-g128-rot", "int8")]
    weight, seen = torch.randn(4, 128).half(), moments(128)
    together = dict(rounded("a", weight, candidates(formats, ("gptq",)), seen))
    for format in formats:
        alone = dict(rounded("a", weight, candidates([format], ("gptq",)), seen))
        assert same(of(together, "a", Candidate(format, "gptq")), of(alone, "a", Candidate(format, "gptq"))), (
            format.name
        )


@pytest.mark.parametrize("quantizer", ["gptq", "gptq-trajectory"])
def test_without_moments_mse_replaces_the_quantizer_under_the_same_name(quantizer: str) -> None:
    layer = nn.Conv2d(8, 6, 3, groups=2).half()
    wanted = [Candidate(INT4, quantizer)]
    found = dict(rounded("conv", layer.weight.detach(), wanted, None))
    assert same(of(found, "conv", wanted[0]), mse(INT4, layer.weight.detach()))
    assert (
        quantize_layer(
            "conv",
            layer,
            Choice(INT4, False, quantizer),
            quantization=Quantization(calibration=Calibration(rounded=found)),
        ).tensors.keys()
        == INT4.tensors(layer.weight.shape, F16).keys()
    )


def test_a_format_that_does_not_fit_and_fp16_are_left_out() -> None:
    assert list(rounded("a", torch.randn(4, 65).half(), candidates([ROTATED], QUANTIZERS), moments(65))) == []
    assert list(rounded("a", torch.randn(4, 64).half(), candidates([INT4], ("rtn",)), None)) == []


def test_rounded_tensors_have_the_announced_specs() -> None:
    wanted = candidates([INT4, INT8, ROTATED, format_named("nf4")], QUANTIZERS)
    for shape in ((6, 64), (4, 8, 3, 3)):
        weight = torch.randn(shape).half()
        made = dict(rounded("a", weight, wanted, moments(weight[0].numel())))
        specs = announced("a", shape, wanted, F16)
        assert {key: (spec.dtype, spec.shape) for key, spec in specs.items()} == {
            key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in made.items()
        }


# Weight changes


def test_weight_changes_use_the_rounded_weight(toy_unet: Any) -> None:
    names = ["conv_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    layers = {name: layer for name, layer in quantizable_layers(toy_unet) if name in names}
    wanted = candidates([INT4, INT8], ("rtn", "mse", "gptq"))
    made: dict[RoundedKey, torch.Tensor] = {}
    for name, layer in layers.items():
        made |= dict(rounded(name, layer.weight.detach().half(), wanted, moments(layer.weight[0].numel())))
    calibration = Calibration({name: torch.randn(layer.weight.shape[1:]) for name, layer in layers.items()}, made)
    changes = WeightChanges(layers, wanted, quantization=Quantization(calibration=calibration))
    for name, layer in layers.items():
        gradient, weight = torch.randn(layer.weight.shape), layer.weight.detach().half()
        expected, shifts = [], []
        for c in wanted:
            stored = stored_weight(name, weight, Choice(c.format, False, c.quantizer), calibration)
            delta = c.format.dequantize(stored, weight.shape, torch.float32) - weight.float()
            expected.append(float((delta.double() * gradient.double()).sum()))
            shifts.append(bias_shift(layer, delta, calibration.input_means[name]))
        found = changes.weight_products(name, gradient)
        torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5)
        along = torch.randn(len(layer.weight))
        torch.testing.assert_close(changes.bias_products(name, along), torch.stack(shifts) @ along)
        assert len(set(expected)) > 3, "of eight bits the extremes are often the best range"


# A whole probe


def new_run(
    trajectories: Trajectories, folder: Path, settings: ProbeSettings = AUTO, formats: str = "int3-g32-rot,int4"
) -> ProbeRun:
    chosen = parse_formats(formats)
    layers = inventory(trajectories.target)
    return ProbeRun(trajectories, layers, chosen, F16, "toy", settings, folder, Stages(quiet=True))


@pytest.fixture(scope="module")
def finished(new_trajectories: NewTrajectories, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A probe that tries every quantizer: its trajectories, its reference pass and its table."""
    trajectories = new_trajectories(num_inference_steps=1, guidance_scale=1.0)
    run = new_run(trajectories, tmp_path_factory.mktemp("auto"))
    reference = run.reference()
    return trajectories, reference, run.table(reference)


def test_a_probe_rounds_with_the_moments_of_its_samples(finished: Any) -> None:
    trajectories, reference, _ = finished
    names = ["conv_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_out"]
    found: dict[str, Moments] = {}
    every = [name for name, _ in quantizable_layers(trajectories.target)]
    for sample in SAMPLES:
        measure_moments(trajectories, found, every, sample, True, False)
    layers = trajectories.target.layers
    for name in names:
        weight = layers[name].weight.detach().half()
        expected = dict(rounded(name, weight, candidates([INT4, ROTATED], QUANTIZERS), found[name]))
        kept = {key: tensor for key, tensor in reference.calibration.rounded.items() if key.layer == name}
        assert same(kept, expected), name


def test_every_layer_is_rounded_to_every_candidate_that_fits(finished: Any) -> None:
    trajectories, reference, table = finished
    for name, layer in quantizable_layers(trajectories.target):
        for format in (INT4, ROTATED):
            for quantizer in QUANTIZERS[1:]:
                kept = of(reference.calibration.rounded, name, Candidate(format, quantizer))
                assert bool(kept) == format.fits(layer.weight.shape)
    assert table.quantizers == QUANTIZERS


def test_the_predicted_error_is_lower_than_with_rounding_to_nearest(finished: Any, tmp_path: Path) -> None:
    trajectories, _, table = finished
    alone = ProbeSettings("adjoint", SAMPLES, vectors=2)
    run = new_run(trajectories, tmp_path, alone)
    nearest = run.table(run.reference())
    assert (table.error.sum(0) < 0.9 * nearest.error.sum(0)).all()


def test_scores_agree_with_measurements_using_the_named_quantizer(finished: Any, tmp_path: Path) -> None:
    trajectories, reference, table = finished
    run = new_run(trajectories, tmp_path)
    place = next((i, 1) for i in range(len(table.layers)) if table.choice(i, INT4).quantizer.startswith("gptq"))
    measured = run.remeasured(table, reference, [place])
    sample_errors = []
    choice = {table.layers[place[0]]: table.choice(place[0], INT4)}
    for sample in SAMPLES:
        before = next(trajectories.latents([sample]))
        with quantized(trajectories.target, choice, quantization=Quantization(calibration=reference.calibration)):
            after = next(trajectories.latents([sample]))
        sample_errors.append(float((after - before).double().square().sum()))
    expected = sum(sample_errors) / len(sample_errors) / reference.latent_power
    assert float(measured.error[place]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("memory", [1, 4_000_000, 2**30])
def test_interrupted_rounding_in_many_parts_equals_rounding_in_one_part(
    new_trajectories: NewTrajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    settings = ProbeSettings("adjoint", SAMPLES, vectors=1, quantizers=("gptq-trajectory", "mse"))
    call = {"num_inference_steps": 1, "guidance_scale": 1.0}
    whole = new_run(new_trajectories(**call), tmp_path / "whole", settings, "int4").reference().calibration.rounded
    monkeypatch.setattr(rounding, "_MEMORY", memory)

    def stop_in_the_fifth(path: Path, specs: Any, tensors: Any) -> None:
        if len(list((tmp_path / "parts").rglob("rounded/*.safetensors"))) == 4:
            tensors = itertools.chain(itertools.islice(tensors, 2), killed())
        write_rounded(path, specs, tensors)

    monkeypatch.setattr(rounding_pass, "write_rounded", stop_in_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        new_run(new_trajectories(**call), tmp_path / "parts", settings, "int4").reference()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("rounded/*")}
    assert len(kept) == 4, "the one that was being written is gone"
    monkeypatch.setattr(rounding_pass, "write_rounded", write_rounded)
    resumed = new_run(new_trajectories(**call), tmp_path / "parts", settings, "int4").reference().calibration.rounded
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "made anew"
    assert same(dict(resumed), dict(whole))


def test_moments_of_large_models_may_take_as_much_memory_as_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_MEMORY", 1)
    layers = {str(i): nn.Linear(64, 64) for i in range(4)}  # as many weights as moments
    assert parts(layers, ("gptq",)) == [list("0123")]
    assert parts(layers, ("gptq-trajectory",)) == [list("01"), list("23")]


def test_a_warning_names_layers_whose_gradients_are_not_finite_under_any_scale(
    new_trajectories: NewTrajectories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(scaled_backward, "_HALF_SCALES", [2.0**30, 2.0**24])
    trajectories = new_trajectories(num_inference_steps=1, guidance_scale=1.0, dtype=F16)
    made = {}
    for quantizer in ("gptq", "gptq-trajectory"):
        settings = ProbeSettings("weight", SAMPLES[:1], quantizers=(quantizer,))
        kept = new_run(trajectories, tmp_path, settings, "int4").reference().calibration.rounded
        made[quantizer] = of(kept, "conv_in", Candidate(INT4, quantizer))
        warned = capsys.readouterr().err
        assert ("warning: the gradient at conv_in and 82 other layers is NaN or Inf" in warned) == (quantizer != "gptq")
    assert same(made["gptq-trajectory"], made["gptq"])


def killed() -> Iterator[Any]:
    raise KeyboardInterrupt
    yield


@pytest.mark.parametrize("widest", [64, 150])
def test_grouped_uncalled_and_long_layers_are_rounded_as_well(
    new_trajectories: NewTrajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, widest: int
) -> None:
    monkeypatch.setattr(hessians, "WIDEST", widest)
    trajectories = new_trajectories(num_inference_steps=1, guidance_scale=1.0)
    unet = trajectories.pipe.unet
    unet.idle = nn.Linear(8, 4)  # never called
    unet.conv_in = nn.Sequential(unet.conv_in, nn.Conv2d(16, 16, 3, padding=1, groups=4))
    settings = ProbeSettings("adjoint", SAMPLES[:1], vectors=1, quantizers=("gptq",))
    run = new_run(trajectories, tmp_path, settings, "int4")
    reference = run.reference()
    table = run.table(reference)
    by_mse = set()
    for i, (name, layer) in enumerate(quantizable_layers(unet)):
        kept = of(reference.calibration.rounded, name, Candidate(INT4, "gptq"))
        if same(kept, mse(INT4, layer.weight.detach().half())):
            by_mse.add(name)
        choice = table.choice(i, INT4)
        assert same(
            quantize_layer(name, layer, choice, quantization=Quantization(calibration=reference.calibration)).tensors,
            kept,
        )
    assert by_mse == {"idle"}


@pytest.mark.parametrize("probe_name", ["ablation", "weight"])
def test_probes_that_cannot_choose_a_quantizer_refuse_several(probe_name: str) -> None:
    with pytest.raises(BitPolicyError, match=rf"the {probe_name} probe .* --quantizer, or use --probe adjoint"):
        ProbeSettings(probe_name, SAMPLES, quantizers=QUANTIZERS)
    ProbeSettings(probe_name, SAMPLES, quantizers=("gptq",))


def test_the_weight_probe_scores_the_rounded_weights(new_trajectories: NewTrajectories, tmp_path: Path) -> None:
    trajectories = new_trajectories(num_inference_steps=1, guidance_scale=1.0)
    errors = {}
    for quantizer in ("rtn", "mse", "gptq"):
        run = new_run(trajectories, tmp_path, ProbeSettings("weight", SAMPLES[:1], quantizers=(quantizer,)), "int4")
        table = run.table(run.reference())
        assert table.choice(0, INT4).quantizer == quantizer
        errors[quantizer] = table.error
    assert (errors["mse"] <= errors["rtn"] * (1 + 1e-4)).all()
    assert errors["gptq"].sum() > errors["mse"].sum(), "gptq pays in the weight for what it gains in the output"


def test_fp16_alone_leaves_nothing_to_round(new_trajectories: NewTrajectories, tmp_path: Path) -> None:
    trajectories = new_trajectories(num_inference_steps=1, guidance_scale=1.0)
    settings = ProbeSettings("adjoint", SAMPLES[:1], vectors=1, quantizers=("mse",))
    assert not new_run(trajectories, tmp_path, settings, "fp16").reference().calibration.rounded
