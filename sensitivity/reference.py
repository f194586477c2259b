"""One pass over the calibration samples with the reference: the mean input of every layer, the size of the latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from bitpolicy.kernels.bias_correction import mean_patch
from bitpolicy.kernels.layers import Quantizable, quantizable_layers
from bitpolicy.sensitivity.trajectory import Sample, Trajectories


@dataclass(frozen=True)
class ReferencePass:
    """What the reference did on the calibration samples.

    Attributes:
        calibration: layer name -> E[x] over samples, steps and positions, float32 on the CPU, shape (in) or
            (in, *kernel).
        latent_power: E|x_0|^2, the mean squared norm of the final latent.
    """

    calibration: dict[str, torch.Tensor]
    latent_power: float


def reference_pass(trajectories: Trajectories, samples: Iterable[Sample]) -> ReferencePass:
    """Run every sample once, without gradients. `samples` may be a progress bar over them."""
    means = _RunningMeans()
    handles = [
        layer.register_forward_pre_hook(means.hook(name, layer), with_kwargs=True)
        for name, layer in quantizable_layers(trajectories.denoiser)
    ]
    try:
        powers = [float(latent.square().sum()) for latent in trajectories.latents(samples)]
    finally:
        for handle in handles:
            handle.remove()
    return ReferencePass(means.result(), sum(powers) / len(powers))


class _RunningMeans:
    """Mean over calls, weighted by their samples, summed in float64 in call order."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def hook(self, name: str, layer: Quantizable) -> Callable[..., None]:
        def add(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            patch = mean_patch(layer, x).double() * len(x)  # calls differ in how many samples they hold
            self._sums[name] = self._sums[name] + patch if name in self._sums else patch
            self._counts[name] = self._counts.get(name, 0) + len(x)

        return add

    def result(self) -> dict[str, torch.Tensor]:
        return {name: (total / self._counts[name]).float().cpu() for name, total in self._sums.items()}
