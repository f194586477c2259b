"""Common to all other ways to choose, so that only the assignment differs: formats, rounding, biases and packing.

For every rival, a layer in a format gets the rounding method and the bias correction that scored best in our probe.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peers.entry import ACCOUNTED, Entry, write_entry

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.probes.ablation import alone_name
from bitpolicy.sensitivity.probes.error_split import ErrorSplit
from bitpolicy.sensitivity.probes.run import ProbeRun
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.settings import Settings
from bitpolicy.workflow.plan import Plan

ABLATED = 2  # samples per layer and format: 532 trajectories; our probe runs 16 forward and 32 backward


@dataclass(frozen=True)
class Rivals:
    """What all assignments have in common.

    Attributes:
        plan: the plan of the pipeline.
        work: probe records go to `probes/`, entries to `candidates/`.
        calibration: E[x] of the reference, for corrected biases.
        ours: our own probe's table, which gives the bias correction and the rounding method of a layer in a format.
        vectors: its probe vectors per sample.
    """

    plan: Plan
    work: Path
    calibration: Calibration
    ours: SensitivityTable
    vectors: int = 2

    @classmethod
    def of(cls, plan: Plan, work: Path, quantizer: str = "rtn") -> Rivals:
        """Run our own probe with `quantizer`, or read its records in `work`."""
        settings = Settings(budget="100%", quantizer=quantizer)
        run = plan.probe(settings, work / "probes" / "adjoint-16", Stages())
        reference = run.reference()
        return cls(plan, work, reference.calibration, run.table(reference), settings.vectors)

    @property
    def names(self) -> list[str]:
        """The names of the layers."""
        return [layer.name for layer in self.plan.layers]

    def write(
        self,
        family: str,
        formats: Mapping[str, Format],
        share: float | None,
        kind: str = "assignment",
        about: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Write one policy as an entry, and the formats by layer to `assigned/`. The part of `family` after #
        distinguishes the settings of one family."""
        plan, nbytes = self.plan, self.plan.account.total(formats)
        name = family.replace(" ", "-").replace("#", "") + (f"@{share:.2f}" if share else "")
        row = family.partition(" #")[0]
        counts = {format.name: list(formats.values()).count(format) for format in plan.formats}
        entry = Entry(name, row, kind, nbytes, ACCOUNTED, row, share, {**counts, **(about or {})})
        choices = {layer.name: self.ours.choice(i, formats[layer.name]) for i, layer in enumerate(plan.layers)}
        with quantized(
            plan.trajectories.denoisers[0],
            choices,
            quantization=Quantization(calibration=self.calibration, storage=plan.source.storage),
        ):
            write_entry(self.work / "candidates", entry, plan.trajectories.denoisers[0].state_dict())
        self._assigned(name).parent.mkdir(exist_ok=True)
        self._assigned(name).write_text(json.dumps({layer: f.name for layer, f in formats.items()}, indent=1) + "\n")
        return entry

    def assigned(self, name: str) -> dict[str, Format] | None:
        """The formats by layer of an entry; None if it does not assign our formats."""
        path = self._assigned(name)
        if not path.is_file():
            return None
        return {layer: format_named(format) for layer, format in json.loads(path.read_text()).items()}

    def _assigned(self, name: str) -> Path:
        return self.work / "assigned" / f"{name}.json"

    def probed(self, probe: str) -> SensitivityTable:
        """Another probe's scores, on the calibration samples."""
        run = self._run(probe)
        return run.table(run.reference())

    def split(self) -> ErrorSplit:
        """The errors of our own probe and of single steps, step by step."""
        run = self._run("adjoint")
        return run.split(run.reference())

    def ablated(self) -> SensitivityTable:
        """Measured errors of the final latent with one layer quantized, with the bias that all assignments get."""
        plan, run = self.plan, self._run("ablation", ABLATED)
        packed = [format for format in plan.formats if format.packed]
        columns = torch.tensor([self.ours.formats.index(format) for format in packed])
        table = SensitivityTable(
            "ablation", tuple(self.names), tuple(packed), self.ours.error[:, columns], self.ours.corrected[:, columns]
        )
        places = [*itertools.product(range(len(plan.layers)), range(len(packed)))]
        alone = {alone_name(table, i, j): {self.names[i]: table.choice(i, packed[j])} for i, j in places}
        reference = run.reference()
        means = {**reference.calibration.input_means, **self.calibration.input_means}
        reference = replace(reference, calibration=replace(self.calibration, input_means=means))
        found = run.measure(alone, reference, "ablation")
        errors = [float(measured.power.mean()) / reference.latent_power for measured in found]
        return replace(table, error=torch.tensor(errors, dtype=torch.float64).reshape(table.error.shape))

    def _run(self, probe: str, samples: int = 16) -> ProbeRun:
        settings = Settings(budget="100%", quantizer="rtn", probe=probe, calibration_samples=samples)
        plan = replace(self.plan, split=replace(self.plan.split, calibration=self.plan.split.calibration[:samples]))
        return plan.probe(settings, self.work / "probes" / f"{probe}-{samples}", Stages())
