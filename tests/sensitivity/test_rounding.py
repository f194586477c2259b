"""What quantizers make of every layer, once, in parts, and what of that scores and exports are taken from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitpolicy.kernels.bias_correction import bias_shift
from bitpolicy.kernels.formats import format_named, parse_formats
from bitpolicy.kernels.gptq import Curvature, gptq
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.kernels.quantizers import QUANTIZERS, quantize_data_free
from bitpolicy.kernels.range_search import mse
from bitpolicy.policies.apply import quantize_layer, quantized, stored_weight
from bitpolicy.policies.calibration import rounded_key
from bitpolicy.policies.policy import Choice
from bitpolicy.sensitivity import probe, rounding
from bitpolicy.sensitivity.candidates import Candidate, candidates
from bitpolicy.sensitivity.hessians import Moments, measure_moments
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.probe import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.progress import Stages
from bitpolicy.sensitivity.records import Records
from bitpolicy.sensitivity.rounding import needs_hessian, parts, rounded, rounded_layers
from bitpolicy.sensitivity.samples import split_samples
from bitpolicy.sensitivity.trajectory import Trajectories
from bitpolicy.sensitivity.weight_changes import WeightChanges

NewTrajectories = Callable[..., Trajectories]
F16 = torch.float16
INT4, INT8, ROTATED = (format_named(name) for name in ("int4", "int8", "int3-g32-rot"))
SAMPLES = tuple(split_samples(["a red heart", "pizza"], 2, seed=0))
AUTO = ProbeSettings("adjoint", SAMPLES, vectors=2, quantizers=QUANTIZERS)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return found.keys() == expected.keys() and all(
        found[key].dtype == expected[key].dtype
        and torch.equal(found[key].view(torch.uint8), expected[key].view(torch.uint8))
        for key in expected
    )


def of(found: dict[str, torch.Tensor], name: str, candidate: Candidate) -> dict[str, torch.Tensor]:
    """What was rounded for one candidate, by suffix."""
    prefix = rounded_key(name, Choice(candidate.format, quantizer=candidate.quantizer), "")
    return {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}


def moments(length: int, seed: int = 0) -> Moments:
    draw = torch.Generator().manual_seed(seed)
    x, power = torch.randn(300, length, generator=draw) @ torch.randn(length, length, generator=draw), torch.rand(300)
    return Moments(x.T @ x, (x * power[:, None]).T @ x)


# Parts


@pytest.mark.parametrize("memory", [1, 10_000, 1_000_000, 2**30])
@pytest.mark.parametrize("quantizers", [("rtn", "mse"), ("gptq",), QUANTIZERS], ids="+".join)
def test_parts_hold_every_layer_once_in_order_and_no_more_than_the_memory(
    toy_unet: Any, monkeypatch: pytest.MonkeyPatch, memory: int, quantizers: tuple[str, ...]
) -> None:
    monkeypatch.setattr(rounding, "_MEMORY", memory)
    layers = dict(quantizable_layers(toy_unet))
    found = parts(toy_unet, quantizers)
    assert [name for part in found for name in part] == list(layers)
    if {"gptq", "gptq-trajectory"} & set(quantizers):
        held = [sum(2 * 4 * layers[name].weight[0].numel() ** 2 for name in part) for part in found]
        assert all(nbytes <= memory or len(part) == 1 for nbytes, part in zip(held, found, strict=True))
    assert len(found) == 1 if memory == 2**30 else len(found) >= 1
    assert all(found)


@pytest.mark.parametrize(
    ("layer", "quantizers", "needs"),
    [
        (nn.Linear(8, 8), ("rtn", "mse", "hqq"), False),
        (nn.Linear(8, 8), ("rtn", "gptq"), True),
        (nn.Linear(8, 8), ("gptq-trajectory",), True),
        (nn.Conv2d(8, 8, 3), ("gptq",), True),
        (nn.Conv2d(8, 8, 3, groups=2), ("gptq",), False),
        (nn.Linear(12_288, 1), ("gptq",), True),
        (nn.Linear(12_289, 1), ("gptq",), False),
    ],
    ids=["data-free", "gptq", "trajectory", "conv", "groups", "wide", "too wide"],
)
def test_a_hessian_is_for_those_that_can_have_it(layer: nn.Module, quantizers: tuple[str, ...], needs: bool) -> None:
    assert needs_hessian(layer, quantizers) is needs


# One layer


@pytest.mark.parametrize(
    "format", [INT4, INT8, ROTATED, format_named("nf4"), format_named("fp8")], ids=lambda f: f.name
)
def test_each_candidate_has_what_its_quantizer_makes(format: Any) -> None:
    weight, seen = torch.randn(6, 64).pow(3).half(), moments(64)
    found = rounded("mid.to_q", weight, candidates([format], QUANTIZERS), seen)
    steady = seen.inputs / seen.inputs.diagonal().mean()
    trajectory = steady + seen.seen / seen.seen.diagonal().mean()
    expected = {
        "mse": quantize_data_free("mse", format, weight),
        "hqq": quantize_data_free("hqq", format, weight),
        "gptq": gptq(format, weight, Curvature.of(format.rotated_hessian(steady))),
        "gptq-trajectory": gptq(format, weight, Curvature.of(format.rotated_hessian(trajectory))),
    }
    for quantizer, tensors in expected.items():
        assert same(of(found, "mid.to_q", Candidate(format, quantizer)), tensors), quantizer
    assert len(found) == 4 * len(format.tensors(weight.shape, F16)), "round to nearest needs no keeping"


def test_formats_share_a_hessian_only_where_they_are_rotated_alike() -> None:
    formats = [format_named(n) for n in ("int4", "int4-rot", "int4-g32-rot", "int3-rot", "int4-g128-rot", "int8")]
    weight, seen = torch.randn(4, 128).half(), moments(128)
    together = rounded("a", weight, candidates(formats, ("gptq",)), seen)
    for format in formats:
        alone = rounded("a", weight, candidates([format], ("gptq",)), seen)
        assert same(of(together, "a", Candidate(format, "gptq")), of(alone, "a", Candidate(format, "gptq"))), (
            format.name
        )


@pytest.mark.parametrize("quantizer", ["gptq", "gptq-trajectory"])
def test_without_moments_the_search_for_ranges_takes_the_place_under_the_same_name(quantizer: str) -> None:
    layer = nn.Conv2d(8, 6, 3, groups=2).half()
    wanted = [Candidate(INT4, quantizer)]
    found = rounded("conv", layer.weight.detach(), wanted, None)
    assert same(of(found, "conv", wanted[0]), mse(INT4, layer.weight.detach()))
    assert (
        quantize_layer("conv", layer, Choice(INT4, False, quantizer), found, F16).tensors.keys()
        == INT4.tensors(layer.weight.shape, F16).keys()
    )


def test_a_format_that_does_not_fit_and_fp16_are_left_out() -> None:
    assert rounded("a", torch.randn(4, 65).half(), candidates([ROTATED], QUANTIZERS), moments(65)) == {}
    assert rounded("a", torch.randn(4, 64).half(), candidates([INT4], ("rtn",)), None) == {}


def test_every_layer_is_counted_when_it_is_done(toy_unet: Any) -> None:
    done: list[int] = []
    names = ["conv_in", "conv_out", "time_embedding.linear_1"]
    wanted = candidates([INT4], ("mse",))
    found = rounded_layers(toy_unet, names, wanted, F16, {}, lambda: done.append(1))
    assert len(done) == 3
    assert {key.split("/")[0] for key in found} == set(names)
    layers = dict(quantizable_layers(toy_unet))
    for name in names:
        assert same(of(found, name, wanted[0]), mse(INT4, layers[name].weight.detach().half()))


# What scores are taken from


def test_a_change_of_a_weight_is_that_of_what_was_rounded(toy_unet: Any) -> None:
    names = ["conv_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    layers = {name: layer for name, layer in quantizable_layers(toy_unet) if name in names}
    wanted = candidates([INT4, INT8], ("rtn", "mse", "gptq"))
    made: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        made |= rounded(name, layer.weight.detach().half(), wanted, moments(layer.weight[0].numel()))
        made[name] = torch.randn(layer.weight.shape[1:])
    changes = WeightChanges(layers, wanted, made, F16)
    for name, layer in layers.items():
        gradient, weight = torch.randn(layer.weight.shape), layer.weight.detach().half()
        expected, shifts = [], []
        for c in wanted:
            stored = stored_weight(name, weight, Choice(c.format, False, c.quantizer), made)
            delta = c.format.dequantize(stored, weight.shape, torch.float32) - weight.float()
            expected.append(float((delta.double() * gradient.double()).sum()))
            shifts.append(bias_shift(layer, delta, made[name]))
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
    layers = inventory(trajectories.denoiser)
    return ProbeRun(trajectories, layers, chosen, F16, "toy", settings, folder, Stages(quiet=True))


@pytest.fixture(scope="module")
def finished(new_trajectories: NewTrajectories, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A probe that tries every quantizer: its trajectories, its reference pass and its table."""
    trajectories = new_trajectories(num_inference_steps=1, guidance_scale=1.0)
    run = new_run(trajectories, tmp_path_factory.mktemp("auto"))
    reference = run.reference()
    return trajectories, reference, run.table(reference)


def test_what_a_probe_rounds_is_what_the_moments_of_its_samples_say(finished: Any) -> None:
    trajectories, reference, _ = finished
    names = ["conv_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_out"]
    found: dict[str, Moments] = {}
    every = [name for name, _ in quantizable_layers(trajectories.denoiser)]
    for sample in SAMPLES:
        measure_moments(trajectories, found, every, sample, True, False)
    layers = dict(quantizable_layers(trajectories.denoiser))
    for name in names:
        expected = rounded(
            name, layers[name].weight.detach().half(), candidates([INT4, ROTATED], QUANTIZERS), found[name]
        )
        kept = {key: tensor for key, tensor in reference.calibration.items() if key.startswith(f"{name}/")}
        assert same(kept, expected), name


def test_every_layer_has_every_candidate_that_fits(finished: Any) -> None:
    trajectories, reference, table = finished
    for name, layer in quantizable_layers(trajectories.denoiser):
        for format in (INT4, ROTATED):
            for quantizer in QUANTIZERS[1:]:
                kept = of(reference.calibration, name, Candidate(format, quantizer))
                assert bool(kept) == format.fits(layer.weight.shape)
    assert table.quantizers == QUANTIZERS


def test_the_best_quantizer_is_never_worse_than_rounding_to_nearest(finished: Any, tmp_path: Path) -> None:
    trajectories, _, table = finished
    alone = ProbeSettings("adjoint", SAMPLES, vectors=2)
    run = new_run(trajectories, tmp_path, alone)
    nearest = run.table(run.reference())
    assert (table.error <= nearest.error * (1 + 1e-4) + 1e-15).all()  # some layers' gradients are noise alone
    assert table.error.sum() < 0.9 * nearest.error.sum()
    assert len(table.quantizer.unique()) > 2


def test_scores_are_measured_with_the_quantizer_they_name(finished: Any, tmp_path: Path) -> None:
    trajectories, reference, table = finished
    run = new_run(trajectories, tmp_path)
    place = next((i, 1) for i in range(len(table.layers)) if table.choice(i, INT4).quantizer.startswith("gptq"))
    measured = run.remeasured(table, reference, [place])
    sample_errors = []
    choice = {table.layers[place[0]]: table.choice(place[0], INT4)}
    for sample in SAMPLES:
        before = next(trajectories.latents([sample]))
        with quantized(trajectories.denoiser, choice, reference.calibration, F16):
            after = next(trajectories.latents([sample]))
        sample_errors.append(float((after - before).double().square().sum()))
    expected = sum(sample_errors) / len(sample_errors) / reference.latent_power
    assert float(measured.error[place]) == pytest.approx(expected, rel=1e-4)


def test_rounding_in_many_parts_with_an_interruption_ends_as_in_one_go(
    new_trajectories: NewTrajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "_MEMORY", 4_000_000)
    settings = ProbeSettings("adjoint", SAMPLES, vectors=1, quantizers=("gptq-trajectory", "mse"))
    call = {"num_inference_steps": 1, "guidance_scale": 1.0}
    whole = new_run(new_trajectories(**call), tmp_path / "whole", settings, "int4").reference().calibration
    pieces = list((tmp_path / "whole").rglob("rounded-*.safetensors"))
    assert len(pieces) > 3

    put, made = Records.put, []

    def stop_after_two(self: Records, name: str, tensors: Any) -> None:
        put(self, name, tensors)
        made.append(name)
        if [n for n in made if n.startswith("rounded-")][1:]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Records, "put", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        new_run(new_trajectories(**call), tmp_path / "parts", settings, "int4").reference()
    monkeypatch.setattr(Records, "put", put)
    measured: list[Any] = []
    monkeypatch.setattr(probe, "rounded_layers", lambda *args: measured.append(args[1]) or rounded_layers(*args))
    resumed = new_run(new_trajectories(**call), tmp_path / "parts", settings, "int4").reference().calibration
    assert len(measured) == len(pieces) - 2
    assert same(resumed, whole)


def test_layers_without_a_hessian_are_rounded_all_the_same(
    new_trajectories: NewTrajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "_WIDEST", 64)
    trajectories = new_trajectories(num_inference_steps=1, guidance_scale=1.0)
    trajectories.denoiser.idle = nn.Linear(8, 4)  # never called
    settings = ProbeSettings("adjoint", SAMPLES[:1], vectors=1, quantizers=("gptq",))
    run = new_run(trajectories, tmp_path, settings, "int4")
    reference = run.reference()
    table = run.table(reference)
    by_mse = 0
    for i, (name, layer) in enumerate(quantizable_layers(trajectories.denoiser)):
        kept = of(reference.calibration, name, Candidate(INT4, "gptq"))
        if layer.weight[0].numel() > 64 or name == "idle":
            assert same(kept, mse(INT4, layer.weight.detach().half())), name
            by_mse += 1
        choice = table.choice(i, INT4)
        assert same(quantize_layer(name, layer, choice, reference.calibration, F16).tensors, kept)
    assert 1 < by_mse < len(table.layers)


@pytest.mark.parametrize("probe_name", ["ablation", "weight"])
def test_probes_that_cannot_choose_say_so(probe_name: str) -> None:
    with pytest.raises(probe.BitPolicyError, match=r"does not choose between quantizers; name one with --quantizer"):
        ProbeSettings(probe_name, SAMPLES, quantizers=QUANTIZERS)
    ProbeSettings(probe_name, SAMPLES, quantizers=("gptq",))


def test_the_weight_probe_scores_what_was_rounded(new_trajectories: NewTrajectories, tmp_path: Path) -> None:
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
    assert not [key for key in new_run(trajectories, tmp_path, settings, "fp16").reference().calibration if "/" in key]
