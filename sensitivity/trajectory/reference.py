"""The reference pass over the calibration samples: measures the mean input of every layer and the signal's power."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitpolicy.kernels.layers import Quantizable
from bitpolicy.kernels.quantizers.bias_correction import mean_patch
from bitpolicy.policies.calibration import Calibration
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories


@dataclass(frozen=True)
class ReferencePass:
    """What the reference pass measured on the calibration samples.

    Attributes:
        calibration: E[x] over samples, steps and positions, on the CPU. A probe adds rounded weights to it.
        latent_power: E|x_0|^2, the mean squared norm of the signal. The signal is the final latent, or the image if an
            autoencoder is studied.
        calls: denoiser calls of one trajectory.
    """

    calibration: Calibration
    latent_power: float
    calls: int

    @classmethod
    def of(cls, trajectories: Trajectories, samples: Sequence[Sample]) -> ReferencePass:
        """Run every sample once, without gradients."""
        return cls.merged([reference_part(trajectories, samples)])

    @classmethod
    def merged(cls, parts: Sequence[Mapping[str, torch.Tensor]]) -> ReferencePass:
        """Reduce the results of `reference_part` for each part of the samples, in the order given."""
        total: dict[str, torch.Tensor] = {}
        for part in parts:
            for key, value in part.items():
                total[key] = total[key] + value if key in total else value
        sums = {key.removeprefix(_SUM): value for key, value in total.items() if key.startswith(_SUM)}
        calibration = Calibration({name: (value / total[_COUNT + name]).float() for name, value in sums.items()})
        samples = float(total["samples"])
        return cls(calibration, float(total["power"]) / samples, round(float(total["calls"]) / samples))


_SUM, _COUNT = "sum ", "count "  # no layer name begins with these, because a module path has no spaces


def reference_part(trajectories: Trajectories, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Sums over the trajectories of `samples`, float64, for `ReferencePass.merged`."""
    sums = _Sums()
    layers = trajectories.target.layers.items()
    for sample in samples[:1]:
        trajectories.learn(sample)  # its short runs must not be added up
    handles: list[Any] = [
        layer.register_forward_pre_hook(sums.of_inputs(name, layer), with_kwargs=True) for name, layer in layers
    ]
    handles += [denoiser.register_forward_pre_hook(sums.of_calls) for denoiser in trajectories.denoisers]
    try:
        for part in trajectories.parts(samples):
            sums.samples_now = len(part)
            for signal in trajectories.signals(part):
                sums.add("power", signal.double().square().sum())
                sums.add("samples", torch.ones((), dtype=torch.float64))
    finally:
        for handle in handles:
            handle.remove()
    return sums.total


class _Sums:
    """Sums in float64, in call order."""

    def __init__(self) -> None:
        self.total: dict[str, torch.Tensor] = {}
        self.samples_now = 0  # number of samples that share the current calls

    def add(self, key: str, value: torch.Tensor) -> None:
        value = value.cpu()
        self.total[key] = self.total[key] + value if key in self.total else value

    def of_inputs(self, name: str, layer: Quantizable) -> Callable[..., None]:
        def add(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            rows = torch.tensor(float(len(x)), dtype=torch.float64)  # calls differ in their number of samples
            self.add(_SUM + name, mean_patch(layer, x).double() * rows)
            self.add(_COUNT + name, rows)

        return add

    def of_calls(self, *_: Any) -> None:
        self.add("calls", torch.tensor(float(self.samples_now), dtype=torch.float64))
