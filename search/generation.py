"""Real generations, scored against the reference on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from bitpolicy.policies.apply import quantized
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.policy import Choice
from bitpolicy.sensitivity.trajectory import Sample, Trajectories


class Generations:
    """Images of one pipeline under policies, and how far they are from the reference's.

    Args:
        trajectories: the unquantized pipeline with its call arguments.
        calibration: E[x] per layer, for corrected biases.
        storage: dtype of the stored weights.
    """

    def __init__(self, trajectories: Trajectories, calibration: Calibration, storage: torch.dtype) -> None:
        self._trajectories, self._calibration, self._storage = trajectories, calibration, storage
        self._references: dict[Sample, torch.Tensor] = {}

    def reference(self, sample: Sample) -> torch.Tensor:
        """The reference image, float32, shape (C, H, W), in [0, 1]; made once. Not to be asked for inside `under`."""
        if sample not in self._references:
            self._references[sample] = self._trajectories.image(sample)[0]
        return self._references[sample]

    @contextmanager
    def under(self, choices: Mapping[str, Choice]) -> Iterator[None]:
        """While the block runs, the pipeline computes as the policy's checkpoint would."""
        with quantized(self._trajectories.denoiser, choices, self._calibration, self._storage):
            yield

    def images(self, choices: Mapping[str, Choice], samples: Sequence[Sample]) -> list[torch.Tensor]:
        """The policy's images, each float32, shape (C, H, W), in [0, 1]."""
        with self.under(choices):
            return [self._trajectories.image(sample)[0] for sample in samples]

    def errors(self, choices: Mapping[str, Choice], samples: Sequence[Sample]) -> Generator[float, None, None]:
        """Mean squared error of each sample's image, one at a time so that a loser can be stopped early."""
        references = [self.reference(sample) for sample in samples]
        with self.under(choices):
            for sample, reference in zip(samples, references, strict=True):
                yield float((self._trajectories.image(sample)[0] - reference).double().square().mean())
