"""The split of errors into parts: made-up errors with known parts, and a toy pipeline with quantized layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import parse_formats
from bitpolicy.policies.policy import Choice
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.probes.error_split import ErrorSplit
from bitpolicy.sensitivity.probes.measurement import pairs_mean
from bitpolicy.sensitivity.probes.run import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.probes.stepwise import LocalSketch
from bitpolicy.sensitivity.samples import Sample, split_samples
from bitpolicy.sensitivity.sketches.directions import Random, Shared, Signal
from bitpolicy.sensitivity.sketches.sketch import Sketch

DIMS, SAMPLES, SHARED, STEPS = 400, 24, 600, 2


def made_up(scale: float, bias: float, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx by step, x): errors of one layer whose parts have these norms in each step; x has norm 10."""
    draw = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, DIMS, generator=draw, dtype=torch.float64)
        return values / values.norm(dim=-1, keepdim=True)

    x = unit(SAMPLES) * 10
    common = unit().expand(SAMPLES, STEPS, DIMS)
    return scale * (x / 10)[:, None] + bias * common + noise * unit(SAMPLES, STEPS), x


def split_of(dx: torch.Tensor, x: torch.Tensor) -> ErrorSplit:
    """The split from exact dot products with random vectors, as a probe would compute them."""
    v = torch.randn(SHARED, DIMS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    units = x / x.norm(dim=1, keepdim=True)

    def sketch(values: torch.Tensor, along: float = 0.0) -> Sketch:
        return Sketch(values.float()[:, None, None], torch.zeros(STEPS, 1, 1), along)

    shared = [[sketch(dx[n] @ v[k], float(v[k] @ units[n])) for k in range(SHARED)] for n in range(SAMPLES)]
    signal = [sketch(dx[n] @ units[n]) for n in range(SAMPLES)]
    local = [LocalSketch(sketch(torch.full((STEPS,), 0.5)), torch.tensor([4.0, 1.0]))]
    return ErrorSplit.of(shared, signal, local, float(x.square().sum(1).mean()))


@pytest.mark.parametrize(("scale", "bias", "noise"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 1, 2), (2, 1, 0.5)])
def test_the_split_finds_the_parts_of_a_made_up_error(scale: float, bias: float, noise: float) -> None:
    split = split_of(*made_up(scale, bias, noise))
    steps = STEPS**2  # scale and bias add up over the steps; of the noise, only the power does
    expected = [part / 100 for part in (steps * scale**2, steps * bias**2, STEPS * noise**2)]
    found = [float(part[0, 0, 0, 0]) for part in (split.parallel, split.bias, split.noise)]
    assert found == pytest.approx(expected, rel=0.15, abs=0.04 * sum(expected))
    assert float(split.error[0, 0, 0, 0]) == pytest.approx(sum(found), rel=1e-5)


def test_amplification_is_the_final_error_divided_by_the_error_that_entered() -> None:
    split = split_of(*made_up(0, 1, 0))
    at_step = float(split.error[0, 1, 0, 0]) * 100
    assert float(split.amplification[0, 0, 0, 0]) == pytest.approx((at_step / 0.25) ** 0.5, rel=1e-5)
    assert split.local[0, :, 0, 0].tolist() == pytest.approx([0.25 / 4, 0.25], rel=1e-5)


def test_the_mean_over_pairs_is_taken_over_different_samples() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 5.0]])
    by_hand = [(values[i] * values[j]) for i in range(3) for j in range(3) if i != j]
    torch.testing.assert_close(pairs_mean(values), torch.stack(by_hand).mean(0))
    assert pairs_mean(values[:1]).isnan().all()


@pytest.fixture(scope="module")
def probed(new_trajectories: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of four samples, and its split from many shared probe vectors."""
    trajectories = new_trajectories(num_inference_steps=2, guidance_scale=1.0)
    samples = tuple(split_samples(["a red heart", "pizza", "cat", "moon"], 4, seed=0))
    settings = ProbeSettings("adjoint", samples, vectors=2, shared=24)
    layers = inventory(trajectories.target)
    folder = tmp_path_factory.mktemp("split")
    formats = parse_formats("int4,int8")
    run = ProbeRun(trajectories, layers, formats, torch.float16, "toy", settings, folder, Stages(quiet=True))
    reference = run.reference()
    return run, reference, run.split(reference), [layer.name for layer in layers]


@pytest.mark.parametrize("corrected", [False, True])
def test_the_split_agrees_with_real_trajectories(probed: Any, corrected: bool) -> None:
    run, reference, split, names = probed
    chosen = names[::9]
    policies = {f"p-{name}": {name: Choice(parse_formats("int4")[0], corrected)} for name in chosen}
    measured = run.measure(policies, reference, "truth")
    rows = [names.index(name) for name in chosen]
    truth = torch.tensor([float(m.power.mean()) for m in measured]) / reference.latent_power
    ratio = split.error[int(corrected), 0, rows, 0] / truth
    assert 0.7 < float(ratio.median()) < 1.4
    for part, share in (("mean", "bias_share"), ("parallel", "parallel_share")):
        found = (getattr(split, part) / split.error)[int(corrected), 0, rows, 0]
        expected = torch.tensor([getattr(m, share) for m in measured])
        assert float((found - expected).abs().median()) < 0.12, part


def test_the_parts_never_exceed_the_whole(probed: Any) -> None:
    _, _, split, names = probed
    assert split.error.shape == (2, 3, len(names), 2)
    for part in (split.parallel, split.bias, split.noise, split.mean, split.local, split.amplification):
        assert torch.isfinite(part).all()
        assert (part >= 0).all()
    torch.testing.assert_close(split.parallel + split.bias + split.noise, split.error)
    assert (split.mean <= split.error).all()


def test_a_saved_split_loads_unchanged(probed: Any, tmp_path: Path) -> None:
    split = probed[2]
    split.save(tmp_path / "split.safetensors")
    found = ErrorSplit.load(tmp_path / "split.safetensors")
    assert all(torch.equal(getattr(found, name), getattr(split, name)) for name in vars(split))


def test_the_error_for_a_missing_split_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(BitPolicyError, match=r"split\.safetensors.*run `bitpolicy probe --split` again"):
        ErrorSplit.load(tmp_path / "split.safetensors")


def test_a_split_of_one_sample_is_refused(new_trajectories: Callable[..., Any], tmp_path: Path) -> None:
    trajectories = new_trajectories(num_inference_steps=1)
    settings = ProbeSettings("adjoint", (Sample("cat", 0),))
    layers = inventory(trajectories.target)
    run = ProbeRun(trajectories, layers, parse_formats("int8"), torch.float16, "toy", settings, tmp_path, Stages(True))
    with pytest.raises(BitPolicyError, match="give --samples 2 or more"):
        run.split(run.reference())


def test_only_shared_probe_vectors_are_equal_for_all_samples() -> None:
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cat, dog = Sample("cat", 1), Sample("dog", 2)
    assert torch.equal(Shared(0).vector(latent, cat), Shared(0).vector(latent, dog))
    assert not torch.equal(Shared(0).vector(latent, cat), Shared(1).vector(latent, cat))
    assert not torch.equal(Random(0).vector(latent, cat), Random(0).vector(latent, dog))
    signal = Signal().vector(latent, cat)
    assert float(signal.norm()) == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(signal * latent.norm(), latent)
