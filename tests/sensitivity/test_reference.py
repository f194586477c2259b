"""The mean inputs and the latents' power, against inputs recorded one by one and split into patches by `unfold`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import unfold

from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.sensitivity.samples import split_samples
from bitpolicy.sensitivity.trajectory.reference import ReferencePass
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

NewTrajectories = Callable[..., Trajectories]


def taps(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Every input that the layer's weight multiplies, as rows (samples and positions, inputs)."""
    if isinstance(layer, torch.nn.Linear):
        return x.reshape(-1, layer.in_features)
    patches = unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def caught_means(trajectories: Trajectories, samples: list[Any]) -> dict[str, torch.Tensor]:
    """E[x] of each layer over all rows of all calls, with one call per sample."""
    rows: dict[str, list[torch.Tensor]] = defaultdict(list)
    trajectories.batch = 1
    trajectories.learn(samples[0])  # takes short runs that must not be counted
    hooks = [
        layer.register_forward_hook(
            lambda layer, args, _, name=name: rows[name].append(taps(layer, args[0].double()).mean(0))
        )
        for name, layer in quantizable_layers(trajectories.target)
    ]
    list(trajectories.latents(samples))
    for hook in hooks:
        hook.remove()
    layers = trajectories.target.layers
    return {name: torch.stack(means).mean(0).view(layers[name].weight.shape[1:]) for name, means in rows.items()}


@pytest.mark.parametrize(
    "count",
    [
        1,
        4,
        5,
    ],
)
def test_mean_inputs_are_the_mean_over_every_patch(new_trajectories: NewTrajectories, count: int) -> None:
    samples = split_samples(["cat", "a red heart", "pizza"], count, seed=0)
    found = ReferencePass.of(new_trajectories(), samples).calibration.input_means
    expected = caught_means(new_trajectories(), samples)
    assert set(found) == set(expected) == {name for name, _ in quantizable_layers(new_trajectories().target)}
    for name, patch in found.items():
        assert patch.dtype == torch.float32
        assert torch.allclose(patch.double(), expected[name], rtol=1e-4, atol=1e-5), name


def test_the_power_is_the_mean_squared_norm_of_the_latents(new_trajectories: NewTrajectories) -> None:
    trajectories, samples = new_trajectories(), split_samples(["cat", "dog"], 5, seed=3)
    power = ReferencePass.of(trajectories, samples).latent_power
    norms = [float(latent.double().norm()) for latent in trajectories.latents(samples)]
    assert power == pytest.approx(sum(norm**2 for norm in norms) / 5, rel=1e-5)


def test_an_interruption_leaves_no_hook(new_trajectories: NewTrajectories) -> None:
    trajectories = new_trajectories()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    mine = trajectories.pipe.unet.conv_out.register_forward_hook(stop)  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        ReferencePass.of(trajectories, split_samples(["cat"], 1, seed=0))
    mine.remove()
    assert [name for name, layer in quantizable_layers(trajectories.target) if layer._forward_pre_hooks] == []
