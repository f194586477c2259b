"""Second moments of layer inputs, against sums written out by hand and gradients of a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import nn

from bitpolicy.kernels.layers import Quantizable, quantizable_layers
from bitpolicy.sensitivity.rounding import hessians
from bitpolicy.sensitivity.rounding.hessians import Moments, drawn_inputs, hessian_shape, measure_moments
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches.directions import Random
from bitpolicy.sensitivity.sketches.sketch import only_these_require_grad
from bitpolicy.sensitivity.trajectory import scaled_backward
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

NewTrajectories = Callable[..., Trajectories]
SAMPLE, OTHER = Sample("a red heart", 3), Sample("pizza", 4)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (8, 7)),
    "linear without a batch": (lambda: nn.Linear(7, 5), (7,)),
    "linear on tokens": (lambda: nn.Linear(6, 5), (2, 7, 6)),
    "linear on a grid": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 9)),
    "conv1d with stride and dilation": (lambda: nn.Conv1d(3, 4, 2, stride=3, dilation=2), (2, 3, 17)),
    "conv2d": (lambda: nn.Conv2d(5, 4, 3), (2, 5, 8, 8)),
    "conv2d of one tap": (lambda: nn.Conv2d(5, 4, 1, bias=False), (2, 5, 4, 6)),
    "zero padding": (lambda: nn.Conv2d(5, 4, 3, padding=1), (2, 5, 8, 8)),
    "uneven zero padding": (lambda: nn.Conv2d(5, 4, (2, 3), padding=(0, 2)), (2, 5, 7, 8)),
    "same size": (lambda: nn.Conv2d(5, 4, (3, 4), padding="same"), (2, 5, 7, 8)),
    "no padding by name": (lambda: nn.Conv2d(5, 4, 3, padding="valid"), (2, 5, 7, 8)),
    "stride": (lambda: nn.Conv2d(5, 4, 3, stride=2, padding=1), (2, 5, 8, 9)),
    "stride that skips the rim": (lambda: nn.Conv2d(5, 4, 2, stride=(3, 2)), (2, 5, 9, 9)),
    "dilation": (lambda: nn.Conv2d(5, 4, 3, dilation=(2, 1), padding=2), (2, 5, 9, 9)),
    "stride and dilation": (lambda: nn.Conv2d(5, 4, 3, stride=2, dilation=2, padding=1), (2, 5, 10, 9)),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
    "replicated": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="replicate"), (2, 3, 6, 6)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 5, 4)),
    "a group for each channel": (lambda: nn.Conv2d(3, 6, (3, 2), groups=3, bias=False), (2, 3, 5, 4)),
    "conv1d in groups": (lambda: nn.Conv1d(8, 4, 3, stride=2, groups=4), (2, 8, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 4, 6, 5)),
}
every_layer = pytest.mark.parametrize(("make", "size"), LAYERS.values(), ids=LAYERS)


def of_whole_numbers(make: Callable[[], nn.Module], size: tuple[int, ...]) -> tuple[Any, torch.Tensor]:
    """A layer and its input, float64, with integer values, so that sums are exact in any order."""
    draw = torch.Generator().manual_seed(1)
    layer = make().double()
    for parameter in layer.parameters():
        parameter.data = torch.randint(-9, 10, parameter.shape, generator=draw).double()
    return layer, torch.randint(-9, 10, size, generator=draw).double()


def storage_rows(weight: torch.Tensor) -> torch.Tensor:
    return weight.movedim(1, -1).flatten(1)


@every_layer
def test_drawn_inputs_times_the_weight_give_the_layers_output(
    make: Callable[[], nn.Module], size: tuple[int, ...]
) -> None:
    layer, x = of_whole_numbers(make, size)
    output = layer(x)
    positions, groups = output.numel() // len(layer.weight), getattr(layer, "groups", 1)
    of_group = storage_rows(layer.weight).unflatten(0, (groups, -1))
    for count in (1, 5, 10_000):
        rows, taken = drawn_inputs(layer, x, output, count, torch.Generator().manual_seed(2))
        assert rows.shape == (min(count, positions), groups, layer.weight[0].numel())
        expected = torch.einsum("pgk,gok->pgo", rows, of_group).flatten(1) + (0 if layer.bias is None else layer.bias)
        assert torch.equal(taken(output), expected), count


@every_layer
def test_positions_are_drawn_at_most_once_and_each_one_can_be_drawn(
    make: Callable[[], nn.Module], size: tuple[int, ...]
) -> None:
    layer, x = of_whole_numbers(make, size)
    output = layer(x)
    positions = output.numel() // len(layer.weight)
    linear = isinstance(layer, nn.Linear)
    numbers = torch.arange(positions).reshape(output.shape[:-1] if linear else (len(x), 1, *output.shape[2:]))
    numbered = (numbers.unsqueeze(-1) if linear else numbers).expand(output.shape)
    drawn = set()
    for seed in range(30):
        _, taken = drawn_inputs(layer, x, output, (positions + 1) // 2, torch.Generator().manual_seed(seed))
        found = taken(numbered)[:, 0].tolist()
        assert len(set(found)) == len(found)
        drawn |= set(found)
    assert drawn == set(range(positions))


@pytest.mark.parametrize("groups", [1, 3])
def test_moments_are_sums_of_outer_products_of_the_inputs_of_each_group(groups: int) -> None:
    x, power = torch.randn(10, groups, 4), torch.rand(10, groups)
    moments = Moments.zeros((groups, 1, 4), torch.device("cpu"), seen=True)
    for part in (slice(0, 3), slice(3, 10)):
        moments.add(x[part], power[part])
    for group in range(groups):
        outer = [torch.outer(row, row) for row in x[:, group]]
        torch.testing.assert_close(moments.inputs[group, 0], sum(outer))
        seen = sum(p * o for p, o in zip(power[:, group], outer, strict=True))
        torch.testing.assert_close(moments.seen[group, 0], seen)


@pytest.mark.parametrize("length", [256, 300, 500, 1024])
def test_long_rows_have_only_the_blocks_on_the_diagonal(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(hessians, "WIDEST", 200)
    groups, blocks, k = shape = hessian_shape(nn.Linear(length, 1))
    assert (groups, k % 128) == (1, 0)
    assert (blocks - 1) * k < length <= blocks * k
    moments, x, power = (
        Moments.zeros(shape, torch.device("cpu"), seen=True),
        torch.randn(20, 1, length),
        torch.rand(20, 1),
    )
    moments.add(x, power)
    whole = torch.zeros(blocks * k, blocks * k)
    whole[:length, :length] = x[:, 0].T @ (x[:, 0] * power)
    for i in range(blocks):
        here = slice(i * k, (i + 1) * k)
        torch.testing.assert_close(moments.seen[0, i], whole[here, here])


def test_a_hessian_is_as_wide_as_a_row_of_a_group_up_to_a_limit() -> None:
    assert hessian_shape(nn.Linear(7, 3)) == (1, 1, 7)
    assert hessian_shape(nn.Conv2d(6, 4, (3, 2), groups=2)) == (2, 1, 18)
    assert hessian_shape(nn.Linear(12_288, 1)) == (1, 1, 12_288)
    assert hessian_shape(nn.Linear(15_360, 1)) == (1, 2, 7_680)
    assert hessian_shape(nn.Linear(12_289, 1)) == (1, 2, 6_272)


def test_a_trajectory_hessian_weights_both_moments_equally() -> None:
    x = torch.randn(2, 50, 4)
    moments = Moments((x.mT @ x)[:, None], (x.mT @ (x * torch.logspace(-8, 0, 50)[:, None]))[:, None])
    for group in range(2):
        inputs, seen = moments.inputs[group, 0], moments.seen[group, 0]
        parts = [m / m.diagonal().mean() for m in (inputs, seen)]
        torch.testing.assert_close(moments.hessian("inputs")[group, 0], parts[0])
        torch.testing.assert_close(moments.hessian("trajectory")[group, 0], parts[0] + parts[1])


@pytest.mark.parametrize("seen", [0.0, float("nan"), float("inf")], ids=str)
def test_without_usable_gradients_the_hessian_uses_only_inputs(seen: float) -> None:
    x = torch.randn(50, 4)
    moments = Moments((x.T @ x)[None, None], torch.full((1, 1, 4, 4), seen))
    assert torch.equal(moments.hessian("trajectory"), moments.hessian("inputs"))


def test_a_layer_with_only_zero_inputs_has_a_zero_hessian() -> None:
    moments = Moments.zeros((1, 1, 4), torch.device("cpu"), seen=True)
    moments.add(torch.zeros(5, 1, 4), torch.ones(5, 1))
    assert not moments.hessian("trajectory").any()


# In a pipeline with at most 128 positions per call, so that all of them are drawn


def patches(layer: Quantizable, x: torch.Tensor) -> torch.Tensor:
    """The layer's inputs at each position, in storage order, by torch's own im2col; float64, shape (P, K)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).double()
    columns = nn.functional.unfold(x.double(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    taps = columns.unflatten(1, (x.shape[1], -1))  # (B, in, taps, positions)
    return taps.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


def by_position(layer: Quantizable, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient, shape (P, out), with positions in the order of `patches`."""
    if isinstance(layer, nn.Linear):
        return gradient.reshape(-1, gradient.shape[-1])
    return gradient.flatten(2).movedim(1, 2).flatten(0, 1)


def by_hand(trajectories: Trajectories, sample: Sample) -> dict[str, Moments]:
    """The same sums from one graph of the whole loop, without checkpoints."""
    layers = trajectories.target.layers
    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    trajectories.end(sample)
    handles = [
        layer.register_forward_hook(
            lambda _, args, kwargs, output, name=name: calls.append(
                (name, (args[0] if args else kwargs["input"]).detach(), output)
            ),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    with only_these_require_grad(trajectories, layers):
        latent = trajectories.differentiable_signal(sample)
        v = Random(hessians._DIRECTION).vector(latent, sample)
        gradients = torch.autograd.grad((latent * v).sum(), [output for _, _, output in calls])
    for handle in handles:
        handle.remove()
    found: dict[str, Moments] = {}
    for (name, x, _), gradient in zip(calls, gradients, strict=True):
        rows = patches(layers[name], x)
        power = by_position(layers[name], gradient.double()).square().sum(1)
        zeros = torch.zeros(1, 1, rows.shape[1], rows.shape[1], dtype=torch.float64)
        moments = found.setdefault(name, Moments(zeros, zeros.clone()))
        moments.inputs += rows.T @ rows
        moments.seen += (rows * power[:, None]).T @ rows
    return found


def measured(
    trajectories: Trajectories, *samples: Sample, seen: bool, inside: bool = False, names: list[str] | None = None
) -> dict[str, Moments]:
    found: dict[str, Moments] = {}
    for sample in samples:
        every = [name for name, _ in quantizable_layers(trajectories.target)]
        measure_moments(trajectories, found, names or every, sample, seen, inside)
    return found


def assert_near(found: torch.Tensor, expected: torch.Tensor, about: str) -> None:
    distance = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert distance < 1e-4, (about, distance)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("inside", [False, True], ids=["calls", "blocks"])
def test_moments_agree_with_a_plain_loop(new_trajectories: NewTrajectories, scheduler: Any, inside: bool) -> None:
    trajectories = new_trajectories(scheduler, num_inference_steps=2)
    expected = by_hand(trajectories, SAMPLE)
    found = measured(trajectories, SAMPLE, seen=True, inside=inside)
    assert found.keys() == expected.keys()
    assert len(found) == 83
    for name in expected:
        assert_near(found[name].inputs, expected[name].inputs, f"inputs of {name}")
        assert_near(found[name].seen, expected[name].seen, f"seen of {name}")


def test_without_gradients_every_input_counts_the_same(new_trajectories: NewTrajectories) -> None:
    trajectories = new_trajectories(num_inference_steps=2)
    expected = by_hand(trajectories, SAMPLE)
    for name, moments in measured(trajectories, SAMPLE, seen=False).items():
        assert_near(moments.inputs, expected[name].inputs, name)
        assert moments.seen is None
        assert torch.equal(moments.hessian("trajectory"), moments.hessian("inputs"))


def test_moments_of_several_samples_add_up(new_trajectories: NewTrajectories) -> None:
    trajectories = new_trajectories(num_inference_steps=2)
    one, other = (measured(trajectories, sample, seen=True) for sample in (SAMPLE, OTHER))
    for name, moments in measured(trajectories, SAMPLE, OTHER, seen=True).items():
        assert_near(moments.inputs, one[name].inputs + other[name].inputs, name)
        assert_near(moments.seen, one[name].seen + other[name].seen, name)


def test_only_the_requested_layers_are_measured(new_trajectories: NewTrajectories) -> None:
    trajectories = new_trajectories(num_inference_steps=1)
    assert measured(trajectories, SAMPLE, seen=True, names=["conv_in", "conv_out"]).keys() == {"conv_in", "conv_out"}
    untouched: dict[str, Moments] = {}
    measure_moments(trajectories, untouched, [], SAMPLE, True, False)
    assert untouched == {}


@pytest.mark.parametrize("seen", [True, False])
def test_a_layer_that_is_never_called_has_no_moments(new_trajectories: NewTrajectories, seen: bool) -> None:
    trajectories = new_trajectories(num_inference_steps=1)
    trajectories.pipe.unet.idle = nn.Linear(3, 3)
    found = measured(trajectories, SAMPLE, seen=seen)
    assert "idle" not in found
    assert len(found) == 83


@pytest.mark.parametrize("seen", [True, False])
def test_a_layer_may_receive_its_input_as_a_keyword_argument(new_trajectories: NewTrajectories, seen: bool) -> None:
    trajectories = new_trajectories(num_inference_steps=2)
    names = ["conv_in", "time_embedding.linear_1"]
    expected = measured(trajectories, SAMPLE, seen=seen, names=names)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = trajectories.pipe.unet.get_submodule(parent)
        setattr(owner, leaf, ByName(owner.get_submodule(leaf)))
    found = measured(trajectories, SAMPLE, seen=seen, names=[f"{name}.layer" for name in names])
    for name in names:
        assert torch.equal(found[f"{name}.layer"].inputs, expected[name].inputs)
        kinds = ("inputs", "trajectory")
        assert all(torch.equal(found[f"{name}.layer"].hessian(kind), expected[name].hessian(kind)) for kind in kinds)


class ByName(nn.Module):
    """Passes its input to its layer as a keyword argument."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(input=x)


@pytest.mark.parametrize("seen", [True, False])
def test_measuring_leaves_no_trace(new_trajectories: NewTrajectories, seen: bool) -> None:
    trajectories = new_trajectories(num_inference_steps=2)
    model = trajectories.pipe.unet
    expected = next(trajectories.latents([SAMPLE]))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    first = measured(trajectories, SAMPLE, seen=seen)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert list(leftovers(model)) == []
    assert torch.equal(next(trajectories.latents([SAMPLE])), expected)
    second = measured(trajectories, SAMPLE, seen=seen)
    assert all(
        torch.equal(first[n].hessian(kind), second[n].hessian(kind)) for n in first for kind in ("inputs", "trajectory")
    )


def leftovers(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if module._forward_hooks or "forward" in vars(module):
            yield name
    for name, parameter in model.named_parameters():
        if parameter.grad is not None or parameter._post_accumulate_grad_hooks:
            yield name


def test_a_random_part_of_many_positions_represents_all(
    new_trajectories: NewTrajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectories = new_trajectories(num_inference_steps=3)
    every = measured(trajectories, SAMPLE, seen=True, names=["conv_in"])["conv_in"]
    monkeypatch.setattr(hessians, "POSITIONS", 32)  # of 128
    part = measured(trajectories, SAMPLE, seen=True, names=["conv_in"])["conv_in"]
    assert float(part.inputs[0, 0].trace() / every.inputs[0, 0].trace()) == pytest.approx(1 / 4, rel=0.25)
    again = measured(trajectories, SAMPLE, seen=True, names=["conv_in"])["conv_in"]
    assert torch.equal(part.seen, again.seen)
    assert not torch.equal(part.inputs, measured(trajectories, OTHER, seen=True, names=["conv_in"])["conv_in"].inputs)


def test_draws_for_a_layer_do_not_depend_on_the_other_measured_layers(
    new_trajectories: NewTrajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that resumes after being killed then rounds the missing layers as an uninterrupted run would."""
    trajectories = new_trajectories(num_inference_steps=2)
    monkeypatch.setattr(hessians, "POSITIONS", 16)
    every, alone = (measured(trajectories, SAMPLE, seen=True, names=names) for names in (None, ["conv_out"]))
    assert torch.equal(every["conv_out"].seen, alone["conv_out"].seen)
    assert torch.equal(every["conv_out"].inputs, alone["conv_out"].inputs)


@pytest.mark.parametrize("scales", [[256.0, 1.0], [2.0**30, 4.0], [2.0**30, 2.0**20, 0.5]], ids=str)
def test_samples_have_the_same_weight_under_float16_as_under_float32(
    new_trajectories: NewTrajectories, monkeypatch: pytest.MonkeyPatch, scales: list[float]
) -> None:
    """Gradients are scaled to stay finite, and the scale is divided out again."""
    monkeypatch.setattr(scaled_backward, "_HALF_SCALES", scales)
    names = ["conv_in", "conv_out", "time_embedding.linear_1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"]
    full = new_trajectories(num_inference_steps=2)
    half = new_trajectories(num_inference_steps=2, dtype=torch.float16)
    finite = next(scale for scale in scales if scale <= 256)
    for sample in (SAMPLE, OTHER):
        expected, found, known = {}, {}, {}
        measure_moments(full, expected, names, sample, True, False)
        measure_moments(half, found, names, sample, True, False, known)
        assert known == {sample: finite}
        for name in names:
            distance = (found[name].seen - expected[name].seen).norm() / expected[name].seen.norm()
            assert distance < 0.03, (name, float(distance))


def test_the_gradient_scale_is_found_once_per_sample(
    new_trajectories: NewTrajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = new_trajectories(num_inference_steps=1, dtype=torch.float16)
    tried: list[float] = []
    monkeypatch.setattr(hessians, "backward", lambda *a, **k: tried.append(a[2]) or scaled_backward.backward(*a, **k))
    alone, after, known = {}, {}, {SAMPLE: 256.0}
    measure_moments(half, after, ["conv_in"], SAMPLE, True, False, known)
    assert tried == [256.0]
    measure_moments(half, alone, ["conv_in"], SAMPLE, True, False)
    assert tried[1:] == [256.0, 256.0], "one to try, one to measure"
    assert torch.equal(alone["conv_in"].seen, after["conv_in"].seen), "the trial is not measured"


def test_moments_of_half_precision_are_float32(new_trajectories: NewTrajectories) -> None:
    """Models in half precision still have their moments summed in float32."""
    trajectories = new_trajectories(dtype=torch.bfloat16, num_inference_steps=1)
    found = measured(trajectories, SAMPLE, seen=True)
    assert {m.inputs.dtype for m in found.values()} == {m.seen.dtype for m in found.values()} == {torch.float32}
    assert all(torch.isfinite(m.seen).all() and m.inputs.diagonal().sum() > 0 for m in found.values())
