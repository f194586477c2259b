"""How close two sets of images are: PSNR on decoded float images, before any rounding to 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio


@dataclass(frozen=True)
class Psnr:
    """PSNR over pairs of images.

    Attributes:
        per_image: dB of each pair, None where the two are identical.
    """

    per_image: tuple[float | None, ...]

    @classmethod
    def of(cls, reference: Sequence[torch.Tensor], images: Sequence[torch.Tensor]) -> Psnr:
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
        """Strict JSON: identical images are counted apart, never infinite."""
        n = len(self.per_image)
        return {"mean": _rounded(self.mean), "min": _rounded(self.min), "n": n, "identical": n - len(self.differing)}


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(peak_signal_noise_ratio(b.double(), a.double(), data_range=1.0))


def _rounded(db: float | None) -> float | None:
    return None if db is None else round(db, 3)
