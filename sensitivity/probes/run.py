"""Runs a probe over calibration samples: reference pass, rounding, scores, and the measurements after them.

Every finished piece is stored on disk, so that an interrupted run can resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.quantizers.named import RTN
from bitpolicy.policies.finite import left_as_they_were
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.calls.watched_loop import schedulers
from bitpolicy.sensitivity.cost.forwards import Cost
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.probes.ablation import alone_name, choice_at
from bitpolicy.sensitivity.probes.adjoint import AdjointProbe
from bitpolicy.sensitivity.probes.error_split import ErrorSplit
from bitpolicy.sensitivity.probes.measurement import Ablations, Measured
from bitpolicy.sensitivity.probes.named import probe_named
from bitpolicy.sensitivity.probes.probe import ProbeInputs
from bitpolicy.sensitivity.probes.stepwise import StepwiseProbe
from bitpolicy.sensitivity.probes.weight import weight_errors
from bitpolicy.sensitivity.records import Piece, Records, settings_key
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.rounding.corrections import beyond_range
from bitpolicy.sensitivity.rounding.kept_rounding import KeptRounding
from bitpolicy.sensitivity.rounding.rounding_pass import HESSIAN_SAMPLES, RoundingPass
from bitpolicy.sensitivity.samples import Sample, fingerprint
from bitpolicy.sensitivity.sketches.directions import Direction, Shared, Signal
from bitpolicy.sensitivity.sketches.shrinkage import can_shrink, shrunk
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.checkpointed_calls import is_large
from bitpolicy.sensitivity.trajectory.reference import ReferencePass, reference_part
from bitpolicy.sensitivity.trajectory.trajectories import LoopError, Trajectories
from bitpolicy.sensitivity.workers import complete

SHARED = "adjoint probe, shared vectors"  # the label of the progress bar of `ProbeRun.split`
_ROUNDING = 2  # raised when rounding methods change their codes, so that stored results never mix with new ones
_OUTLIER = 30.0  # times the median sketch; a warning names a sketch beyond that


@dataclass(frozen=True)
class ProbeSettings:
    """The settings of a probe.

    Attributes:
        probe: its name, one of `bitpolicy.sensitivity.probes.named.PROBES`.
        samples: the calibration samples.
        vectors: probe vectors per sample, for the adjoint and the stepwise probe.
        shared: probe vectors common to all samples, for `ProbeRun.split`.
        quantizers: rounding methods; if there are several, the best by score is kept for each layer and format.
        compute: activation quantization of packed layers. If it rounds inputs, their error includes that.
        memory: bytes for sums of gradients and packed weights; None for half of what is free.
    """

    probe: str
    samples: tuple[Sample, ...]
    vectors: int = 2
    shared: int = 8
    quantizers: tuple[str, ...] = (RTN,)
    compute: Compute = Compute.EXACT
    memory: int | None = None

    def __post_init__(self) -> None:
        require_one_quantizer(self.probe, self.quantizers)
        if not self.samples or self.vectors < 1 or self.shared < 1:
            raise BitPolicyError(
                f"a probe needs at least one of each: got {len(self.samples)} samples, {self.vectors} vectors, "
                f"{self.shared} shared vectors"
            )


def require_one_quantizer(probe: str, quantizers: Sequence[str]) -> None:
    """Check that the probe can choose between the rounding methods, if there are several.

    Raises:
        BitPolicyError: there is no such probe, or it cannot choose.
    """
    if not probe_named(probe).chooses_quantizer and len(quantizers) > 1:
        raise BitPolicyError(
            f"the {probe} probe cannot choose between rounding methods; name one with --quantizer, or use "
            "--probe adjoint"
        )


class ProbeRun:
    """One probe of one pipeline, which can resume from `folder`.

    Args:
        trajectories: the pipeline with its call arguments.
        inventory: the layers under study.
        formats: candidate formats; only the packed ones are scored.
        storage: dtype of the stored weights.
        weights: a hash of everything in the pipeline that the numbers depend on.
        folder: where finished pieces are stored.
        stages: shows progress and measures time.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        inventory: Sequence[Layer],
        formats: Sequence[Format],
        storage: torch.dtype,
        weights: str,
        settings: ProbeSettings,
        folder: Path,
        stages: Stages,
    ) -> None:
        self._trajectories, self._inventory, self._storage = trajectories, inventory, storage
        self._formats = tuple(format for format in formats if format.packed)
        self._settings, self._stages = settings, stages
        self._large = is_large(trajectories)
        self._folder = folder / settings_key(self._identity(weights))
        self._records = Records(self._folder)
        self._ablations = Ablations(trajectories, settings.samples, self._records, self._stages)

    def _identity(self, weights: str) -> dict[str, Any]:
        """Everything the numbers depend on."""
        pipe = self._trajectories.pipe
        steppers = [part for one in schedulers(pipe) for part in (type(one).__name__, dict(one.config))]
        quantizers = {"quantizers": list(self._settings.quantizers), "rounding": _ROUNDING}
        compute = self._settings.compute
        return {
            "weights": weights,
            "compute": str(self._trajectories.target.dtype),
            "pipeline": type(pipe).__name__,
            "scheduler": steppers,
            "call": fingerprint(self._trajectories.call),
            "samples": [sample.identity() for sample in self._settings.samples],
            "formats": [f.parameters() for f in self._formats],
            **(quantizers if self._settings.quantizers != (RTN,) else {}),
            **({} if compute is Compute.EXACT else {"products": compute.value}),
        }

    def reference(self) -> ReferencePass:
        """The mean inputs and the signal's power over the calibration samples, with the rounded weights if any."""
        parts = list(self._trajectories.parts(self._settings.samples))
        by_name = {f"reference-{i}": part for i, part in enumerate(parts)}

        def make(names: Sequence[str]) -> Iterator[tuple[str, Piece]]:
            for name in self._stages.track(names, "reference"):
                yield name, reference_part(self._trajectories, by_name[name])

        with self._stages.timed("reference"):
            found = ReferencePass.merged(list(complete(self._records, list(by_name), make).values()))
        if self._settings.quantizers == (RTN,):
            return found
        with self._stages.timed("round"):
            rounded = KeptRounding(self._rounding.files())
        return replace(found, calibration=replace(found.calibration, rounded=rounded))

    @property
    def _rounding(self) -> RoundingPass:
        samples, folder = self._settings.samples[:HESSIAN_SAMPLES], self._folder / "rounded"
        wanted = candidates(self._formats, self._settings.quantizers)
        return RoundingPass(self._trajectories, wanted, self._storage, samples, self._large, folder, self._stages)

    def _inputs(self, reference: ReferencePass) -> ProbeInputs:
        return ProbeInputs(
            trajectories=self._trajectories,
            inventory=self._inventory,
            formats=self._formats,
            quantizers=self._settings.quantizers,
            samples=self._settings.samples,
            vectors=self._settings.vectors,
            reference=reference,
            quantization=self._quantization(reference),
            ablations=self._ablations,
            records=self._records,
            stages=self._stages,
            recompute_inside=self._large,
            memory=self._settings.memory,
        )

    def _quantization(self, reference: ReferencePass) -> Quantization:
        return Quantization(calibration=reference.calibration, storage=self._storage, compute=self._settings.compute)

    def table(self, reference: ReferencePass) -> SensitivityTable:
        """The scores of every layer in every packed format.

        If the sampling loop cannot be differentiated, the stepwise probe replaces the adjoint probe, with a warning on
        stderr.
        """
        with self._stages.timed("probe"):
            try:
                table = probe_named(self._settings.probe)(self._inputs(reference)).table()
            except LoopError as error:
                if outside := ", ".join(self._trajectories.outside):
                    raise BitPolicyError(f"{error}; leave {outside} out, or use --probe ablation") from error
                self._stages.warn(
                    f"{error}; using the stepwise probe instead, which does not see how the sampler amplifies errors"
                )
                table = StepwiseProbe(self._inputs(reference)).table()
            sketches = 0 if table.sketches is None else len(table.sketches)
            if can_shrink(sketches, len(table.formats), table.inputs is not None):
                table = shrunk(table, self._weight_errors(reference))
        self._warn_of_outliers(table)
        corrected = table.corrected.clone()
        corrected[[not self._correctable(layer, reference) for layer in self._inventory]] = False
        corrected = self._storable(replace(table, corrected=corrected), reference)
        cost = self._cost(table.probe, reference, 0)
        return replace(table, corrected=corrected, cost=cost, compute=self._settings.compute)

    def _weight_errors(self, reference: ReferencePass) -> torch.Tensor:
        """The relative weight error of every layer with every candidate."""
        wanted = candidates(self._formats, self._settings.quantizers)

        def make(names: Sequence[str]) -> Iterator[tuple[str, Piece]]:
            for name in self._stages.track(names, "weight errors"):
                found = weight_errors(self._trajectories.target, wanted, quantization=self._quantization(reference))
                yield name, {"error": found}

        return complete(self._records, ["weight-errors"], make)["weight-errors"]["error"]

    @staticmethod
    def _correctable(layer: Layer, reference: ReferencePass) -> bool:
        """Whether bias correction is safe: the layer has no bias, or its mean input is known."""
        return not layer.has_bias or layer.name in reference.calibration.input_means

    def _storable(self, table: SensitivityTable, reference: ReferencePass) -> torch.Tensor:
        """`table.corrected`, without the corrected biases that the storage dtype cannot hold."""
        layers, corrected = self._trajectories.target.layers, table.corrected.clone()
        names = []
        for place in beyond_range(table, layers, quantization=self._quantization(reference)):
            corrected[place] = False
            names.append(table.layers[place[0]])
        if names:
            self._stages.warn(left_as_they_were(list(dict.fromkeys(names)), self._storage))
        return corrected

    def _cost(self, probe: str, reference: ReferencePass, measured: int) -> Cost:
        inputs = self._inputs(reference)
        once = inputs.trajectory_forwards
        everything = once * len(self._inventory) * len(self._formats)
        return Cost(once, probe_named(probe)(inputs).forwards(), measured * once, everything)

    def split(self, reference: ReferencePass) -> ErrorSplit:
        """The parts of each layer's error, from probe vectors that all samples share.

        Raises:
            BitPolicyError: there are fewer than two samples.
            LoopError: the sampling loop cannot be differentiated.
        """
        if len(self._settings.samples) < 2:
            raise BitPolicyError("the split compares samples, but there is only one; give --samples 2 or more")
        with self._stages.timed("split"):
            inputs = replace(self._inputs(reference), quantizers=self._settings.quantizers[:1])
            directions: list[Direction] = [Shared(k) for k in range(self._settings.shared)]
            memory = inputs.memory_by_step()
            found = AdjointProbe(inputs).sketches([*directions, Signal()], memory, SHARED)
            shared, signal = [of_sample[:-1] for of_sample in found], [of_sample[-1] for of_sample in found]
            return ErrorSplit.of(shared, signal, StepwiseProbe(inputs).sketches(memory), reference.latent_power)

    def measure(
        self, policies: Mapping[str, Mapping[str, Choice]], reference: ReferencePass, label: str, images: bool = False
    ) -> list[Measured]:
        """The measured error of each policy. Layers that a policy does not name stay as they are.

        Args:
            policies: record name -> layer name -> choice.
            label: of the progress bar.
            images: also decode, and measure the images' error.
        """
        return self._ablations.measure(policies, label, images, quantization=self._quantization(reference))

    def remeasured(
        self, table: SensitivityTable, reference: ReferencePass, places: Iterable[tuple[int, int]]
    ) -> SensitivityTable:
        """`table` with the errors at the given places (layer, column of the format) measured by ablation."""
        done = table.measured if table.measured is not None else torch.zeros_like(table.corrected)
        wanted = [place for place in dict.fromkeys(places) if not done[place]]
        if not wanted:
            return table
        with self._stages.timed("re-measure"):
            alone = {alone_name(table, *place): {table.layers[place[0]]: choice_at(table, *place)} for place in wanted}
            found = self.measure(alone, reference, "re-measuring")
        errors = [float(m.power.mean()) / reference.latent_power for m in found]
        table = table.remeasured(dict(zip(wanted, errors, strict=True)))
        assert table.measured is not None
        return replace(table, cost=self._cost(table.probe, reference, int(table.measured.sum())))

    def _warn_of_outliers(self, table: SensitivityTable) -> None:
        """Warn about a sketch that is far larger than the others. It is kept all the same."""
        if table.sketches is None or len(table.sketches) < 4:
            return
        power = table.sketches.double().square().sum((1, 2))
        worst = int(power.argmax())
        if power[worst] > _OUTLIER * power.median():
            sample = self._settings.samples[worst // self._settings.vectors]
            self._stages.warn(
                f"one sketch of {len(power)} is {float(power[worst] / power.median()):.0f} times the median: "
                f"{sample.prompt!r}, seed {sample.seed}; give more --samples for steadier scores"
            )
