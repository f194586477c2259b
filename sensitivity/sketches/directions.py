"""Probe vectors: directions of the final latent along which a backward pass differentiates.

`Random` vectors are N(0, I) and independent for every sample: the mean of <v, dx>^2 is |dx|^2 (Hutchinson 1990).
`Shared` vectors are the same for all samples: the mean over pairs of samples of <v, dx_n> <v, dx_m> is |E dx|^2, the
part of the error that is a bias. `Signal` is the latent's own direction: <v, dx> is how much the error scales the
image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitpolicy.sensitivity.samples import Sample

_MASK = 2**64 - 1


@dataclass(frozen=True)
class Random:
    """The `index`-th random vector of one sample."""

    index: int

    @property
    def name(self) -> str:
        return str(self.index)

    def vector(self, latent: torch.Tensor, sample: Sample) -> torch.Tensor:
        """The vector, float32, in the shape and on the device of `latent`."""
        return _normal(latent, 0x5EED, sample.seed, self.index)


@dataclass(frozen=True)
class Shared:
    """The `index`-th random vector that all samples share."""

    index: int

    @property
    def name(self) -> str:
        return f"shared-{self.index}"

    def vector(self, latent: torch.Tensor, sample: Sample) -> torch.Tensor:
        """The vector, float32, in the shape and on the device of `latent`. It does not depend on the sample."""
        return _normal(latent, 0x5A2ED, self.index)


@dataclass(frozen=True)
class Signal:
    """The latent's own direction, x_0 / |x_0|, of norm 1."""

    @property
    def name(self) -> str:
        return "signal"

    def vector(self, latent: torch.Tensor, sample: Sample) -> torch.Tensor:
        """The vector, float32, in the shape and on the device of `latent`."""
        return signal_of(latent)


Direction = Random | Shared | Signal


def signal_of(latent: torch.Tensor) -> torch.Tensor:
    """x_0 / |x_0|, float32."""
    signal = latent.detach().float()
    return signal / signal.norm().clamp(min=torch.finfo(torch.float32).tiny)


def stream(*words: int) -> torch.Generator:
    """A separate random stream for each sequence of words.

    Words are mixed by splitmix64's finalizer, so that no stream equals that of a sample's initial noise. Along a vector
    that happens to be the noise, an error would look many times too large.
    """
    mixed = 0
    for word in words:
        mixed = ((mixed ^ word) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) & _MASK
        mixed ^= mixed >> 31
    return torch.Generator("cpu").manual_seed(mixed & (_MASK >> 1))


def _normal(like: torch.Tensor, *words: int) -> torch.Tensor:
    """N(0, I), float32, in the shape and on the device of `like`."""
    return torch.randn(like.shape, generator=stream(*words)).to(like.device)
