"""The adjoint probe against finite differences and plain autograd, and the state that it has to restore.

For a perturbation D of a weight, the probe's sketch is <v, J D>, the derivative of <v, x_0> along D. The tests nudge
the weight itself by a little of D, run the sampler twice and divide: central differences use no gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.probes.adjoint import AdjointSketches
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches.directions import Random, Shared, Signal
from bitpolicy.sensitivity.sketches.sketch import Sketch
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

Means = dict[str, torch.Tensor]
NewTrajectories = Callable[..., Trajectories]
NewCalibration = Callable[[torch.nn.Module], Means]
Nudges = Mapping[str, torch.Tensor]
SAMPLE, SEED = Sample("a red heart", 11), 4
ONE_OF_EACH_ROLE = (
    "conv_in",
    "conv_out",
    "time_embedding.linear_1",
    "down_blocks.0.resnets.0.time_emb_proj",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv_shortcut",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.1.attentions.0.proj_in",
    "up_blocks.1.resnets.1.conv1",
)
LOOPS = {  # scheduler, guidance, size of the step, accuracy: Euler and DPM++ round the sample to float32 in each step
    "DDIM": (DDIMScheduler, 3.0, 1e-4, 1e-5),
    "DDIM without guidance": (DDIMScheduler, 1.0, 1e-4, 1e-5),
    "Euler": (EulerDiscreteScheduler, 3.0, 1e-2, 2e-2),
    "Euler without guidance": (EulerDiscreteScheduler, 1.0, 1e-2, 2e-2),
    "DPM++ 2M": (DPMSolverMultistepScheduler, 3.0, 1e-2, 2e-2),
    "DPM++ 2M without guidance": (DPMSolverMultistepScheduler, 1.0, 1e-2, 2e-2),
}


def sketches(trajectories: Trajectories, nudge: Any, calibration: Means, *seeds: int) -> list[Sketch]:
    probe = AdjointSketches(
        trajectories,
        candidates([nudge]),
        quantization=Quantization(calibration=Calibration(calibration), storage=torch.float32),
    )
    return list(probe.sketches(SAMPLE, [Random(seed) for seed in seeds or (SEED,)]))


def layer_names(trajectories: Trajectories) -> list[str]:
    return [name for name, _ in quantizable_layers(trajectories.target)]


def weight_nudge(trajectories: Trajectories, nudge: Any, name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": nudge.delta(trajectories.pipe.unet.get_parameter(f"{name}.weight").shape)}


def bias_nudge(trajectories: Trajectories, nudge: Any, name: str, calibration: Means) -> dict[str, torch.Tensor]:
    """-D E[x], summed over everything but the output; empty for a layer without a bias."""
    if trajectories.pipe.unet.get_submodule(name).bias is None:
        return {}
    (delta,) = weight_nudge(trajectories, nudge, name).values()
    return {f"{name}.bias": -(delta.double() * calibration[name]).flatten(1).sum(1)}


@contextmanager
def moved(trajectories: Trajectories, nudges: Nudges, amount: float) -> Iterator[None]:
    parameters = {name: trajectories.pipe.unet.get_parameter(name) for name in nudges}
    before = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = before[name] + amount * nudges[name].to(before[name])
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def projected(trajectories: Trajectories) -> float:
    """<v, x_0>, in float64."""
    seeded = torch.Generator().manual_seed(SAMPLE.seed)
    latent = trajectories.pipe(SAMPLE.prompt, generator=seeded, output_type="latent", **trajectories.call).images
    return float((Random(SEED).vector(latent, SAMPLE).double() * latent.double()).sum())


def slope(trajectories: Trajectories, nudges: Nudges, amount: float) -> float:
    """(<v, x_0(W + a D)> - <v, x_0(W - a D)>) / 2a."""
    ends = []
    for sign in (1, -1):
        with moved(trajectories, nudges, sign * amount):
            ends.append(projected(trajectories))
    return (ends[0] - ends[1]) / (2 * amount)


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest, new_trajectories: NewTrajectories) -> tuple[Trajectories, float, float]:
    scheduler, guidance, amount, accuracy = LOOPS[request.param]
    return new_trajectories(scheduler, torch.float64, guidance_scale=guidance), amount, accuracy


def test_a_sketch_is_the_slope_that_finite_differences_find(
    loop: tuple[Trajectories, float, float], nudge: Any, random_calibration: NewCalibration
) -> None:
    trajectories, amount, accuracy = loop
    calibration, names = random_calibration(trajectories.target), layer_names(trajectories)
    (found,) = sketches(trajectories, nudge, calibration)
    weight = dict(zip(names, found.weight.sum(0)[:, 0].tolist(), strict=True))
    bias = dict(zip(names, found.bias.sum(0)[:, 0].tolist(), strict=True))
    for name in ONE_OF_EACH_ROLE:
        expected = slope(trajectories, weight_nudge(trajectories, nudge, name), amount)
        assert weight[name] == pytest.approx(expected, rel=accuracy, abs=accuracy * found.weight.std().item()), name
        expected = slope(trajectories, bias_nudge(trajectories, nudge, name, calibration), amount)
        assert bias[name] == pytest.approx(expected, rel=accuracy, abs=accuracy * found.bias.std().item()), name


def test_all_layers_together_have_the_slope_that_finite_differences_find(
    loop: tuple[Trajectories, float, float], nudge: Any, random_calibration: NewCalibration
) -> None:
    trajectories, amount, accuracy = loop
    calibration, names = random_calibration(trajectories.target), layer_names(trajectories)
    (found,) = sketches(trajectories, nudge, calibration)
    weights = {k: v for name in names for k, v in weight_nudge(trajectories, nudge, name).items()}
    biases = {k: v for name in names for k, v in bias_nudge(trajectories, nudge, name, calibration).items()}
    for part, nudges in ((found.weight, weights), (found.bias, biases)):
        total = part.double().sum().item()
        tolerance = accuracy * part.sum(0).norm().item()
        assert total == pytest.approx(slope(trajectories, nudges, amount / 10), abs=tolerance)


def test_each_step_has_the_slope_of_a_nudge_in_that_step_alone(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration
) -> None:
    trajectories = new_trajectories(dtype=torch.float64)
    (found,) = sketches(trajectories, nudge, random_calibration(trajectories.target))
    name = "mid_block.resnets.0.conv1"
    index = layer_names(trajectories).index(name)
    (delta,) = weight_nudge(trajectories, nudge, name).values()
    weight = trajectories.pipe.unet.get_parameter(f"{name}.weight")
    whole, amount = weight.data, 1e-4
    for step in range(3):
        ends = []
        for sign in (1, -1):
            calls = itertools.count()

            def only_now(*_: Any, step: int = step, sign: int = sign, calls: Iterator[int] = calls) -> None:
                weight.data = whole + sign * amount * delta.double() if next(calls) == step else whole

            hook = trajectories.pipe.unet.register_forward_pre_hook(only_now)
            ends.append(projected(trajectories))
            hook.remove()
            weight.data = whole
        expected = (ends[0] - ends[1]) / (2 * amount)
        assert found.weight[step, index, 0].item() == pytest.approx(expected, rel=1e-4), step


def test_the_steps_add_up_to_the_gradient_of_plain_autograd(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration
) -> None:
    trajectories = new_trajectories(dtype=torch.float64)
    (found,) = sketches(trajectories, nudge, random_calibration(trajectories.target))
    undecorated = StableDiffusionPipeline.__call__.__wrapped__  # type: ignore[attr-defined]
    seeded = torch.Generator().manual_seed(SAMPLE.seed)
    latent = undecorated(
        trajectories.pipe, SAMPLE.prompt, generator=seeded, output_type="latent", **trajectories.call
    ).images
    (Random(SEED).vector(latent, SAMPLE) * latent).sum().backward()
    expected = []
    for name, layer in quantizable_layers(trajectories.target):
        (delta,) = weight_nudge(trajectories, nudge, name).values()
        expected.append(float((layer.weight.grad * delta).sum()))  # type: ignore[operator]
    torch.testing.assert_close(
        found.weight.sum(0)[:, 0], torch.tensor(expected), rtol=1e-4, atol=1e-5 * found.weight.std().item()
    )


@pytest.mark.parametrize("steps", [1, 4])
def test_a_sketch_has_one_row_per_step(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration, steps: int
) -> None:
    trajectories = new_trajectories(num_inference_steps=steps)
    (found,) = sketches(trajectories, nudge, random_calibration(trajectories.target))
    assert found.weight.shape == found.bias.shape == (steps, 83, 1)
    assert (found.weight.abs().amax((1, 2)) > 0).all()


def test_a_layer_without_a_bias_has_no_bias_part(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration
) -> None:
    trajectories = new_trajectories()
    (found,) = sketches(trajectories, nudge, random_calibration(trajectories.target))
    has_bias = torch.tensor([layer.bias is not None for _, layer in quantizable_layers(trajectories.target)])
    assert torch.equal(found.bias.abs().amax((0, 2)) > 0, has_bias)


def test_several_formats_in_one_pass_give_the_same_as_one_pass_each(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration
) -> None:
    trajectories = new_trajectories()
    calibration = random_calibration(trajectories.target)
    formats = [format_named("int4"), nudge, format_named("int8")]
    (together,) = AdjointSketches(
        trajectories, candidates(formats), quantization=Quantization(calibration=Calibration(calibration))
    ).sketches(SAMPLE, [Random(SEED)])
    for column, format in enumerate(formats):
        (alone,) = AdjointSketches(
            trajectories, candidates([format]), quantization=Quantization(calibration=Calibration(calibration))
        ).sketches(SAMPLE, [Random(SEED)])
        torch.testing.assert_close(together.weight[..., column], alone.weight[..., 0], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(together.bias[..., column], alone.bias[..., 0], rtol=1e-3, atol=1e-6)


def test_several_vectors_on_one_trajectory_give_the_same_as_one_trajectory_each(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration
) -> None:
    trajectories = new_trajectories()
    calibration = random_calibration(trajectories.target)
    together = sketches(trajectories, nudge, calibration, 0, 1, 2)
    for seed, found in enumerate(together):
        (alone,) = sketches(trajectories, nudge, calibration, seed)
        assert torch.equal(found.weight, alone.weight)
        assert torch.equal(found.bias, alone.bias)
    assert not torch.allclose(together[0].weight, together[1].weight)


def test_recomputing_inside_the_denoiser_changes_nothing(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration
) -> None:
    trajectories = new_trajectories(dtype=torch.float64)
    calibration = random_calibration(trajectories.target)
    (expected,) = sketches(trajectories, nudge, calibration)
    (found,) = AdjointSketches(
        trajectories,
        candidates([nudge]),
        recompute_inside=True,
        quantization=Quantization(calibration=Calibration(calibration), storage=torch.float32),
    ).sketches(SAMPLE, [Random(SEED)])
    torch.testing.assert_close(found.weight, expected.weight)
    assert not trajectories.pipe.unet.is_gradient_checkpointing  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_agrees_with_full_precision(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration, dtype: torch.dtype
) -> None:
    full, half = new_trajectories(), new_trajectories(dtype=dtype)
    calibration = random_calibration(full.target)
    (expected,), (found,) = sketches(full, nudge, calibration), sketches(half, nudge, calibration)
    error = (found.weight.sum(0) - expected.weight.sum(0)).norm() / expected.weight.sum(0).norm()
    assert error < {torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        (torch.float16, "try --dtype bfloat16 or float32"),
        (torch.bfloat16, "try --dtype float32"),
        (torch.float32, "wider range than float32.* check the model's weights"),
    ],
    ids=str,
)
def test_a_gradient_that_is_not_finite_is_refused_and_the_advice_names_another_dtype(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration, dtype: torch.dtype, remedy: str
) -> None:
    trajectories = new_trajectories(dtype=dtype)
    calibration = random_calibration(trajectories.target)
    trajectories.pipe.unet.get_parameter("conv_out.weight").data[0, 0, 0, 0] = float("nan")
    with pytest.raises(BitPolicyError, match=rf"step 1: conv_out gives NaN or Inf.*{remedy}") as found:
        sketches(trajectories, nudge, calibration)
    assert str(dtype).removeprefix("torch.") not in str(found.value).partition("--dtype")[2].split()


# State to restore


def parameters(trajectories: Trajectories) -> dict[str, torch.nn.Parameter]:
    modules = {n: m for n, m in trajectories.pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}


@contextmanager
def leaving_no_trace(trajectories: Trajectories) -> Iterator[None]:
    """Fail unless flags, gradients, hooks, the denoiser's forward and the scheduler's step are restored."""
    for i, parameter in enumerate(parameters(trajectories).values()):
        parameter.requires_grad_(i % 3 != 0)
    flags = {name: p.requires_grad for name, p in parameters(trajectories).items()}
    yield
    assert {name: p.requires_grad for name, p in parameters(trajectories).items()} == flags
    assert [name for name, p in parameters(trajectories).items() if p.grad is not None] == []
    assert [name for name, p in parameters(trajectories).items() if p._post_accumulate_grad_hooks] == []
    assert "forward" not in vars(trajectories.pipe.unet)
    assert "step" not in vars(trajectories.pipe.scheduler)


def test_a_pass_leaves_no_trace(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration
) -> None:
    trajectories = new_trajectories()
    bits = {name: p.data.clone() for name, p in parameters(trajectories).items()}
    with leaving_no_trace(trajectories):
        sketches(trajectories, nudge, random_calibration(trajectories.target))
    assert [name for name, p in parameters(trajectories).items() if not torch.equal(p.data, bits[name])] == []


@pytest.mark.parametrize("call", range(1, 6))  # three calls forward, then each again in the backward pass
def test_an_interruption_leaves_no_trace(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration, call: int
) -> None:
    trajectories, calls = new_trajectories(), itertools.count(1)

    def stop(*_: Any) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt

    trajectories.pipe.unet.conv_out.register_forward_pre_hook(stop)  # type: ignore[union-attr]
    with leaving_no_trace(trajectories), pytest.raises(KeyboardInterrupt):
        sketches(trajectories, nudge, random_calibration(trajectories.target))


def test_a_reader_that_stops_early_leaves_no_trace(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration
) -> None:
    trajectories = new_trajectories()
    probe = AdjointSketches(
        trajectories,
        candidates([nudge]),
        quantization=Quantization(
            calibration=Calibration(random_calibration(trajectories.target)), storage=torch.float32
        ),
    )
    with leaving_no_trace(trajectories):
        passes = probe.sketches(SAMPLE, [Random(0), Random(1), Shared(0), Signal()])
        next(passes)
        passes.close()  # type: ignore[attr-defined]


def test_gradients_left_by_earlier_training_do_not_count(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration
) -> None:
    trajectories = new_trajectories()
    calibration = random_calibration(trajectories.target)
    (expected,) = sketches(trajectories, nudge, calibration)
    for parameter in parameters(trajectories).values():
        parameter.grad = torch.ones_like(parameter)
    (found,) = sketches(trajectories, nudge, calibration)
    assert (found.weight - expected.weight).abs().max() == 0
    assert (found.bias - expected.bias).abs().max() == 0


def test_a_forward_set_on_the_instance_is_restored(
    new_trajectories: NewTrajectories, nudge: Any, random_calibration: NewCalibration
) -> None:
    """accelerate's offloading hooks set such a forward."""
    trajectories, calls = new_trajectories(), itertools.count()
    usual = trajectories.pipe.unet.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        next(calls)
        return usual(*args, **kwargs)

    trajectories.pipe.unet.forward = own  # type: ignore[method-assign]
    sketches(trajectories, nudge, random_calibration(trajectories.target))
    assert next(calls) >= 6
    assert trajectories.pipe.unet.forward is own


# Probe vectors


def directions() -> dict[tuple[int, int], torch.Tensor]:
    seeds = [0, 1, 2, 3, 17, 1_000_000, 1_000_001, 10_000_000, 2**31, 2**40]
    latent = torch.empty(1, 4, 8, 8)
    return {(s, k): Random(k).vector(latent, Sample("cat", s)).flatten() for s in seeds for k in range(8)}


def unit_rows(vectors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.stack(list(vectors)))


def test_probe_vectors_are_standard_normal_and_reproducible() -> None:
    first, again = directions(), directions()
    assert all(torch.equal(first[key], again[key]) for key in first)
    values = torch.cat(list(first.values()))
    assert values.mean().abs() < 4 / len(values) ** 0.5
    assert values.var().sub(1).abs() < 4 * (2 / len(values)) ** 0.5


def test_probe_vectors_are_independent() -> None:
    together = unit_rows(directions().values())
    cosines = together @ together.T - torch.eye(len(together))
    assert cosines.abs().max() < 6 / 256**0.5  # six standard deviations of the cosine of independent vectors


def test_no_probe_vector_equals_the_initial_noise_of_a_sample() -> None:
    found = directions()
    seeds = {seed for key in found for seed in key} | {s + k for s, k in found} | {s * 8 + k for s, k in found}
    noise = [torch.randn(256, generator=torch.Generator().manual_seed(seed)) for seed in sorted(seeds)]
    cosines = unit_rows(found.values()) @ unit_rows(noise).T
    assert cosines.abs().max() < 6 / 256**0.5
