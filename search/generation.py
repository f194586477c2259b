"""Generates images and compares them with the reference on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import torch

from bitpolicy.policies.apply import quantized
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.search.quality.objective import MSE, Objective
from bitpolicy.search.quality.psnr import mean_square
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories


class Score(NamedTuple):
    """How far one image is from the reference's.

    Attributes:
        distance: as the objective measures it; >= 0.
        mse: mean squared error.
    """

    distance: float
    mse: float


class Generations:
    """Images of one pipeline under policies, and how far they are from the reference's.

    Args:
        trajectories: the unquantized pipeline with its call arguments.
        quantization: of the policies' checkpoints.
        objective: the distance between images that `scores` measures.
    """

    def __init__(self, trajectories: Trajectories, *, quantization: Quantization, objective: Objective = MSE) -> None:
        self._trajectories, self._quantization, self.objective = trajectories, quantization, objective
        self._references: dict[Sample, torch.Tensor] = {}

    def references(self, samples: Iterable[Sample]) -> list[torch.Tensor]:
        """The reference images, float32, shape (C, H, W), in [0, 1], generated once each. Not for use in `under`."""
        samples = list(samples)
        missing = [sample for sample in samples if sample not in self._references]
        made = self._trajectories.images(missing)
        self._references |= {sample: image for sample, (image, _) in zip(missing, made, strict=True)}
        return [self._references[sample] for sample in samples]

    @contextmanager
    def under(self, choices: Mapping[str, Choice]) -> Iterator[None]:
        """While the block runs, the pipeline computes as the policy's checkpoint would."""
        with quantized(self._trajectories.target, choices, quantization=self._quantization):
            yield

    def images(self, choices: Mapping[str, Choice], samples: Iterable[Sample]) -> list[torch.Tensor]:
        """The policy's images, each float32, shape (C, H, W), in [0, 1]."""
        with self.under(choices):
            return [image for image, _ in self._trajectories.images(samples)]

    def errors(self, choices: Mapping[str, Choice], samples: Sequence[Sample]) -> Generator[float, None, None]:
        """Mean squared error of each sample's image, one at a time, so that the caller can stop early."""
        with closing(self._pairs(choices, samples)) as pairs:
            for image, reference in pairs:
                yield mean_square(image, reference)

    def scores(self, choices: Mapping[str, Choice], samples: Sequence[Sample]) -> Generator[Score, None, None]:
        """The same with the objective's distance."""
        with closing(self._pairs(choices, samples)) as pairs:
            for image, reference in pairs:
                yield Score(self.objective.distance(reference, image), mean_square(image, reference))

    def _pairs(
        self, choices: Mapping[str, Choice], samples: Sequence[Sample]
    ) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """The policy's image and the reference's of each sample."""
        references = self.references(samples)
        with self.under(choices), closing(self._trajectories.images(samples)) as images:
            for (image, _), reference in zip(images, references, strict=True):
                yield image, reference
