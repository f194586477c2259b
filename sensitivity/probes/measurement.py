"""Ablation: quantize one layer or a whole policy, run the real trajectories, and measure the true error.

    error(l, f) = E|x_0(Q_f(W_l)) - x_0|^2 / E|x_0|^2

over the calibration samples, with the same seeds. If an autoencoder is studied, x_0 is the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.records import Piece, Records
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.sensitivity.workers import complete


@dataclass(frozen=True)
class Measured:
    """The measured error of some choices over N samples, not yet divided by the latents' power.

    Attributes:
        power: |dx_0|^2 of each sample, float64, shape (N).
        parallel: <dx_0, x_0> / |x_0| of each sample, float64, shape (N).
        mean: |E dx_0|^2, the part that is a bias. The estimate over pairs of samples is unbiased, so it may be slightly
            negative. NaN for one sample.
        image_mse: mean squared error of each sample's decoded image, float64, shape (N); empty without images.
    """

    power: torch.Tensor
    parallel: torch.Tensor
    mean: float
    image_mse: torch.Tensor

    @classmethod
    def of(cls, errors: torch.Tensor, reference: torch.Tensor, image_mse: torch.Tensor) -> Measured:
        """Compute it from dx_0 and x_0, shape (N, ...)."""
        dx, x = errors.double().flatten(1), reference.double().flatten(1)
        unit = x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        parallel = (dx * unit).sum(1)
        return cls(dx.square().sum(1), parallel, float(pairs_mean(dx).sum()), image_mse.double())

    @property
    def bias_share(self) -> float:
        """Share of the error that is its mean over samples, in [0, 1]; 0 if unknown."""
        return self._share(self.mean)

    @property
    def parallel_share(self) -> float:
        """Share of the error along the signal, which is a scale error, in [0, 1]."""
        return self._share(float(self.parallel.square().mean()))

    @property
    def psnr_db(self) -> float | None:
        """Mean PSNR of the images in dB; None without images, or if one is identical to its reference."""
        if not len(self.image_mse) or not self.image_mse.all():
            return None
        return float((-10 * self.image_mse.log10()).mean())

    def _share(self, part: float) -> float:
        whole = float(self.power.mean())
        return min(max(part / whole, 0.0), 1.0) if whole > 0 and not math.isnan(part) else 0.0

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a record."""
        bias = torch.tensor([self.mean], dtype=torch.float64)
        return {"power": self.power, "parallel": self.parallel, "bias": bias, "image_mse": self.image_mse}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Measured:
        return cls(tensors["power"], tensors["parallel"], float(tensors["bias"][0]), tensors["image_mse"])


def pairs_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of x_n x_m over pairs n != m of the first axis: (|sum x|^2 - sum |x|^2) / N (N - 1), element by element.

    It is NaN for a single value.
    """
    count = len(values)
    if count < 2:
        return torch.full_like(values[0], torch.nan)
    return (values.sum(0).square() - values.square().sum(0)) / (count * (count - 1))


@dataclass(frozen=True)
class References:
    """What errors are measured against: the unquantized results of the same samples.

    Attributes:
        latents: shape (N, ...); images in [0, 1] if an autoencoder is studied.
        images: shape (N, C, H, W) or (N, frames, C, H, W); None if only latents are measured.
    """

    latents: torch.Tensor
    images: torch.Tensor | None

    @classmethod
    def of(cls, trajectories: Trajectories, samples: Sequence[Sample], images: bool) -> References:
        """Run `samples` on the pipeline in its current state.

        Raises:
            BitPolicyError: the samples give latents of different sizes.
        """
        if not images:
            return cls(_stacked(trajectories.signals(samples)), None)
        drawn, signals = zip(*trajectories.images_and_signals(samples), strict=True)
        return cls(_stacked(signals), _stacked(drawn))

    def measured(self, found: References) -> Measured:
        """The error of `found` against these references."""
        mse = torch.empty(0)
        if self.images is not None and found.images is not None:
            mse = (found.images - self.images).double().square().flatten(1).mean(1)
        return Measured.of(found.latents - self.latents, self.latents, mse)


def _stacked(values: Iterable[torch.Tensor]) -> torch.Tensor:
    together = list(values)
    sizes = {tuple(value.shape) for value in together}
    if len(sizes) > 1:
        raise BitPolicyError(
            f"the requests give several sizes, {', '.join(map(str, sorted(sizes)))}, but a measurement needs one size; "
            "give all requests the same size, or measure nothing (--remeasure 0, no --check)"
        )
    return torch.stack(together)


def ablate(
    trajectories: Trajectories,
    choices: Mapping[str, Choice],
    samples: Sequence[Sample],
    reference: References,
    *,
    quantization: Quantization,
) -> Measured:
    """Measure the error of `choices`. Layers that they do not name stay as they are."""
    with quantized(trajectories.target, choices, quantization=quantization):
        found = References.of(trajectories, samples, images=reference.images is not None)
    return reference.measured(found)


class Ablations:
    """Measures policies on some samples, and stores each measurement on disk.

    Args:
        trajectories: the pipeline with its call arguments.
        samples: the trajectories to run under each policy.
        records: stores the measurements.
        stages: shows progress.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        samples: Sequence[Sample],
        records: Records,
        stages: Stages,
    ) -> None:
        self._trajectories, self._samples = trajectories, samples
        self._records, self._stages = records, stages
        self._held: References | None = None

    def measure(
        self,
        policies: Mapping[str, Mapping[str, Choice]],
        label: str,
        images: bool = False,
        *,
        quantization: Quantization,
    ) -> list[Measured]:
        """The measured error of each policy. Layers that a policy does not name stay as they are.

        Args:
            policies: record name -> layer name -> choice.
            label: of the progress bar.
            images: also decode, and measure the images' error.
            quantization: its calibration covers the policies.
        """

        def make(names: Sequence[str]) -> Iterator[tuple[str, Piece]]:
            for name in self._stages.track(names, label):
                found = ablate(
                    self._trajectories,
                    policies[name],
                    self._samples,
                    self._references(images),
                    quantization=quantization,
                )
                yield name, found.tensors()

        return [Measured.from_tensors(t) for t in complete(self._records, list(policies), make).values()]

    def _references(self, images: bool) -> References:
        if self._held is None or images != (self._held.images is not None):
            self._held = References.of(self._trajectories, self._samples, images)
        return self._held
