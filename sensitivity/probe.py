"""Run a probe over calibration samples: reference pass, then the scores, every finished piece kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.format import Format
from bitpolicy.policies.accounting import weights_hash
from bitpolicy.sensitivity.ablation import ablate
from bitpolicy.sensitivity.adjoint import AdjointProbe, Sketch
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.progress import Stages
from bitpolicy.sensitivity.records import Records, settings_key
from bitpolicy.sensitivity.reference import ReferencePass, reference_pass
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory import Sample, Trajectories
from bitpolicy.sensitivity.weight_error import weight_errors

PROBES = ("adjoint", "ablation", "weight")
_LARGE = 500_000_000  # parameters; from here on the denoiser is also checkpointed inside, block by block


@dataclass(frozen=True)
class ProbeSettings:
    """What a probe is to do.

    Attributes:
        probe: one of PROBES.
        samples: calibration trajectories.
        vectors: random directions a sample, for the adjoint probe.
    """

    probe: str
    samples: tuple[Sample, ...]
    vectors: int = 2

    def __post_init__(self) -> None:
        if self.probe not in PROBES:
            raise BitPolicyError(f"unknown probe {self.probe!r}; write any of {', '.join(PROBES)}")
        if not self.samples or self.vectors < 1:
            raise BitPolicyError(
                f"a probe needs samples and vectors; got {len(self.samples)} samples, {self.vectors} vectors"
            )


class ProbeRun:
    """One probe of one pipeline, resumable from `folder`.

    Args:
        trajectories: the pipeline with its call arguments.
        inventory: the denoiser's layers.
        formats: candidate formats; only the packed ones are scored.
        storage: dtype of the stored weights.
        folder: where finished pieces are kept.
        stages: progress and timing.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        inventory: Sequence[Layer],
        formats: Sequence[Format],
        storage: torch.dtype,
        settings: ProbeSettings,
        folder: Path,
        stages: Stages,
    ) -> None:
        self._trajectories, self._inventory, self._storage = trajectories, inventory, storage
        self._formats = tuple(format for format in formats if format.packed)
        self._settings, self._stages = settings, stages
        self._records = Records(folder / settings_key(self._identity()))

    def _identity(self) -> dict[str, Any]:
        """Everything the numbers depend on."""
        denoiser, pipe = self._trajectories.denoiser, self._trajectories.pipe
        scheduler: Any = pipe.scheduler
        return {
            "weights": weights_hash(denoiser, self._storage),
            "compute": str(next(denoiser.parameters()).dtype),
            "pipeline": type(pipe).__name__,
            "scheduler": [type(scheduler).__name__, dict(scheduler.config)],
            "call": self._trajectories.call,
            "samples": [(s.prompt, s.seed) for s in self._settings.samples],
            "formats": [f.parameters() for f in self._formats],
        }

    def reference(self) -> ReferencePass:
        """The mean inputs and latents' power over the calibration samples."""
        samples = self._settings.samples
        with self._stages.timed("reference"):
            found = self._records.get("reference")
            if found is None:
                tracked = self._stages.track(samples, "reference")
                done = reference_pass(self._trajectories, tracked)
                found = {**done.calibration, " power": torch.tensor([done.latent_power], dtype=torch.float64)}
                self._records.put("reference", found)
        power = float(found.pop(" power"))
        return ReferencePass(found, power)

    def table(self, reference: ReferencePass) -> SensitivityTable:
        """The scores of every layer in every packed format."""
        names = [layer.name for layer in self._inventory]
        with self._stages.timed("probe"):
            if self._settings.probe == "adjoint":
                return SensitivityTable.from_sketches(
                    names, self._formats, self._sketches(reference), reference.latent_power
                )
            if self._settings.probe == "ablation":
                power = self._ablation(reference) / reference.latent_power
                error, corrected = power.amin(0), power[1] <= power[0]
                return SensitivityTable("ablation", tuple(names), self._formats, error, corrected)
            error = weight_errors(self._trajectories.denoiser, self._formats, self._storage)
            corrected = torch.ones_like(error, dtype=torch.bool)
            return SensitivityTable("weight", tuple(names), self._formats, error, corrected)

    def _sketches(self, reference: ReferencePass) -> list[Sketch]:
        """Every sketch, in sample order, new ones appended to the records as they are made."""
        denoiser = self._trajectories.denoiser
        large = sum(p.numel() for p in denoiser.parameters()) >= _LARGE
        probe = AdjointProbe(
            self._trajectories, self._formats, reference.calibration, self._storage, recompute_inside=large
        )
        samples, vectors = self._settings.samples, self._settings.vectors
        sketches = []
        for i, sample in self._stages.track(list(enumerate(samples)), "adjoint probe"):
            missing = [k for k in range(vectors) if self._records.get(f"sketch-{i}-{k}") is None]
            for k, sketch in zip(missing, probe.sketches(sample, missing), strict=True) if missing else ():
                self._records.put(f"sketch-{i}-{k}", {"weight": sketch.weight, "bias": sketch.bias})
            for k in range(vectors):
                piece = self._records.get(f"sketch-{i}-{k}")
                assert piece is not None
                sketches.append(Sketch(piece["weight"], piece["bias"]))
        return sketches

    def _ablation(self, reference: ReferencePass) -> torch.Tensor:
        """|dx_0|^2 of every layer, shape (2, layers, formats)."""
        samples = self._settings.samples
        latents: list[torch.Tensor] = []
        rows = []
        for layer in self._stages.track(self._inventory, "ablation probe"):
            piece = self._records.get(f"ablation-{layer.name}")
            if piece is None:
                latents = latents or list(self._trajectories.latents(samples))
                arguments = (self._formats, reference.calibration, self._storage, samples, latents)
                piece = {"power": ablate(self._trajectories, layer, *arguments)}
                self._records.put(f"ablation-{layer.name}", piece)
            rows.append(piece["power"])
        return torch.stack(rows, dim=1)
