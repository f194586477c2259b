"""The rounding pass: rounds every layer by every candidate once, part by part, and stores each layer on disk.

A layer's rounding depends only on its weight and the samples. So any process can compute it, in any order, and a pass
that was killed resumes with the missing layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.layers import Quantizable
from bitpolicy.policies.calibration import RoundedKey
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.probes.compute_range import advice
from bitpolicy.sensitivity.rounding.candidates import Candidate
from bitpolicy.sensitivity.rounding.hessians import Moments, measure_moments
from bitpolicy.sensitivity.rounding.kept_rounding import is_whole, write_rounded
from bitpolicy.sensitivity.rounding.rounding import announced, needs_gradients, needs_hessian, parts, rounded
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.trajectories import LoopError, Trajectories
from bitpolicy.sensitivity.workers import complete_files

HESSIAN_SAMPLES = 8  # of the calibration samples, on whose trajectories Hessians are measured


@dataclass(frozen=True)
class RoundingPass:
    """One rounding pass: what to round, by which methods, and where to store it.

    Attributes:
        trajectories: the pipeline with its call arguments.
        candidates: packed formats, each with its rounding method.
        storage: dtype of the stored weights.
        samples: the samples on whose trajectories Hessians are measured.
        recompute_inside: also checkpoint inside the denoiser.
        folder: holds one file per layer.
        stages: shows progress and warnings.
    """

    trajectories: Trajectories
    candidates: Sequence[Candidate]
    storage: torch.dtype
    samples: Sequence[Sample]
    recompute_inside: bool
    folder: Path
    stages: Stages
    _scales: dict[Sample, float] = field(default_factory=dict)

    def files(self) -> dict[str, Path]:
        """Layer name -> the file with its rounded weights. Missing files are made."""
        paths = {name: self.folder / f"{name}.safetensors" for name in self._layers}

        def whole(name: str) -> bool:
            return is_whole(paths[name], self._specs(name))

        complete_files(paths, whole, lambda names: self._make(names, paths))
        return paths

    @cached_property
    def _layers(self) -> dict[str, Quantizable]:
        return self.trajectories.target.layers

    @property
    def _quantizers(self) -> list[str]:
        return list(dict.fromkeys(candidate.quantizer for candidate in self.candidates))

    def _make(self, names: Sequence[str], paths: dict[str, Path]) -> None:
        together = parts({name: self._layers[name] for name in names}, self._quantizers)
        with self.stages.bar(len(together) * len(self.samples) + len(names), "rounding") as advance:
            for part in together:
                moments = self._moments(part, advance)
                for name in part:
                    weight = self._layers[name].weight.detach().to(self.storage)
                    made = rounded(name, weight, self.candidates, moments.pop(name, None))
                    write_rounded(paths[name], self._specs(name), made)
                    advance()

    def _specs(self, name: str) -> dict[RoundedKey, TensorSpec]:
        return announced(name, self._layers[name].weight.shape, self.candidates, self.storage)

    def _moments(self, names: Sequence[str], advance: Callable[[], None]) -> dict[str, Moments]:
        """Second moments of the inputs of those layers, if a rounding method needs them."""
        if not needs_hessian(self._quantizers):
            return {}
        try:
            found = self._measured(names, needs_gradients(self._quantizers), advance)
        except LoopError as error:
            self.stages.warn(f"{error}; weights are rounded without gradients, by the layers' inputs alone")
            return self._measured(names, False, lambda: None)
        self._warn_if_not_finite(found)
        return found

    def _measured(self, names: Sequence[str], seen: bool, advance: Callable[[], None]) -> dict[str, Moments]:
        found: dict[str, Moments] = {}
        for sample in self.samples:
            measure_moments(self.trajectories, found, names, sample, seen, self.recompute_inside, self._scales)
            advance()
        return found

    def _warn_if_not_finite(self, found: dict[str, Moments]) -> None:
        seen = {name: moments.seen for name, moments in found.items() if moments.seen is not None}
        bad = [name for name in self._layers if name in seen and not torch.isfinite(seen[name]).all()]
        if bad:
            others = f" and {len(bad) - 1} other layers" if bad[1:] else ""
            self.stages.warn(
                f"the gradient at {bad[0]}{others} is NaN or Inf, so rounding uses only the inputs there; "
                f"{advice(self.trajectories.target.dtype)}"
            )
