"""How close two sets of images are, pair by pair, on decoded float images, before any rounding to 8 bits.

PSNR is -10 log10 of the mean squared error. SSIM is Wang et al. 2004, equation 13, with their 11 x 11 Gaussian window.
The latent error is the mean squared difference of the final latents. Each comes with the mean over images, the worst
image, and a 95% interval of the mean: percentiles of 1000 bootstrap means (Efron and Tibshirani 1993, section 13.3),
with a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

Images = Sequence[torch.Tensor]
_RESAMPLES, _TAILS = 1000, (2.5, 97.5)
_WINDOW = 11  # side of SSIM's window, in pixels


@dataclass(frozen=True)
class Psnr:
    """PSNR over pairs of images.

    Attributes:
        per_image: dB of each pair; None if the two are identical.
    """

    per_image: tuple[float | None, ...]

    @classmethod
    def of(cls, reference: Images, images: Images) -> Psnr:
        """Compare pairs of images, shape (C, H, W), float in [0, 1]."""
        return cls(tuple(None if torch.equal(a, b) else _psnr(a, b) for a, b in zip(reference, images, strict=True)))

    @property
    def differing(self) -> list[float]:
        return [db for db in self.per_image if db is not None]

    @property
    def mean(self) -> float | None:
        """Mean of the per-image dB; None if all are identical."""
        return sum(self.differing) / len(self.differing) if self.differing else None

    @property
    def min(self) -> float | None:
        return min(self.differing, default=None)

    def as_dict(self) -> dict[str, float | int | None]:
        """Strict JSON values: identical images are counted separately, so nothing is infinite."""
        n = len(self.per_image)
        return {"mean": _rounded(self.mean), "min": _rounded(self.min), "n": n, "identical": n - len(self.differing)}


@dataclass(frozen=True)
class Unavailable:
    """A metric that cannot be computed here. It never has a number.

    Attributes:
        reason: what is missing.
        remedy: what to do about it.
    """

    reason: str
    remedy: str

    def as_dict(self) -> dict[str, Any]:
        return {"unavailable": self.reason, "remedy": self.remedy}


@dataclass(frozen=True)
class Paired:
    """One number for each pair of images.

    Attributes:
        name: of the metric, including its network if that is not the usual one: "lpips-emoji".
        per_image: None where the metric is infinite: the PSNR of identical images.
        better: "higher" or "lower".
        unit: "dB" or nothing.
        network: the network that the metric uses, if any.
        of_reference: mean of the same metric over the reference's images, for metrics of a single image: CLIPScore.
    """

    name: str
    per_image: tuple[float | None, ...]
    better: str
    unit: str = ""
    network: str | None = None
    of_reference: float | None = None

    @property
    def finite(self) -> list[float]:
        return [value for value in self.per_image if value is not None]

    @property
    def mean(self) -> float | None:
        """The mean over the finite values; None if there are none."""
        return math.fsum(self.finite) / len(self.finite) if self.finite else None

    @property
    def worst(self) -> float | None:
        return (min if self.better == "higher" else max)(self.finite, default=None)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the mean; None with fewer than two finite values."""
        return bootstrap_interval(self.finite)

    def as_dict(self) -> dict[str, Any]:
        """The result as strict JSON values."""
        found = {
            "mean": six_digits(self.mean),
            "worst": six_digits(self.worst),
            "interval": None if self.interval is None else [six_digits(end) for end in self.interval],
            "better": self.better,
            "unit": self.unit,
            "network": self.network,
            "n": len(self.per_image),
            "identical": len(self.per_image) - len(self.finite),
            "per_image": [six_digits(value) for value in self.per_image],
        }
        return found if self.of_reference is None else {**found, "of_reference": six_digits(self.of_reference)}


def psnr(reference: Images, images: Images) -> Paired:
    """`Psnr` with a bootstrap interval."""
    return Paired("psnr", Psnr.of(reference, images).per_image, "higher", "dB")


def ssim(reference: Images, images: Images) -> Paired | Unavailable:
    """SSIM of pairs of images, float in [0, 1], shape (C, H, W), or of videos, (frames, C, H, W), over all frames."""
    smallest = min(min(image.shape[-2:]) for image in reference)
    if smallest < _WINDOW:
        return Unavailable(
            f"the images have {smallest} pixels per side", f"SSIM needs {_WINDOW}: generate larger images"
        )
    return Paired("ssim", _each(_ssim, reference, images), "higher")


def latent_mse(reference: Images, latents: Images) -> Paired:
    """Mean squared difference of final latents of any shape, in the denoiser's units."""
    return Paired("latent", _each(mean_square, reference, latents), "lower")


def mean_square(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean squared difference of two tensors of one shape, in float64."""
    return float((a.double() - b.double()).square().mean())


def frames(image: torch.Tensor) -> torch.Tensor:
    """An image or a video as (frames, 3, H, W). Grey becomes RGB."""
    batch = image if image.ndim == 4 else image[None]
    return batch.expand(-1, 3, -1, -1) if batch.shape[1] == 1 else batch[:, :3]


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 2.5 and 97.5 percentiles of the means of 1000 resamples; None with fewer than two values."""
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values, np.float64)[drawn].mean(1), _TAILS)
    return float(low), float(high)


def six_digits(value: float | None) -> float | None:
    """The value as JSON shows it."""
    return None if value is None else float(f"{value:.6g}")


def _each(
    measure: Callable[[torch.Tensor, torch.Tensor], float], reference: Images, images: Images
) -> tuple[float, ...]:
    return tuple(measure(a, b) for a, b in zip(reference, images, strict=True))


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(peak_signal_noise_ratio(b.double(), a.double(), data_range=1.0))


def _ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = (image.double() if image.ndim == 4 else image[None].double() for image in (a, b))
    found = structural_similarity_index_measure(b, a, data_range=1.0)
    assert isinstance(found, torch.Tensor)
    return float(found)


def _rounded(db: float | None) -> float | None:
    return None if db is None else round(db, 3)
