"""Run a probe over calibration samples: reference pass, then the scores, every finished piece kept on disk.

Pieces have names and do not depend on each other, so that any process can make any of them, in any order, and the
reduced result is the same to the bit.
"""

from __future__ import annotations

import itertools
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
from bitpolicy.sensitivity.calls.watched_loop import schedulers
from bitpolicy.sensitivity.cost.forwards import Cost, adjoint_forwards, stepwise_forwards
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.probes.ablation import Measured, References, ablate
from bitpolicy.sensitivity.probes.adjoint import AdjointProbe
from bitpolicy.sensitivity.probes.directions import Direction, Random, Shared, Signal
from bitpolicy.sensitivity.probes.error_split import ErrorSplit
from bitpolicy.sensitivity.probes.sketch import Sketch, equally_long
from bitpolicy.sensitivity.probes.stepwise import LocalSketch, StepwiseProbe
from bitpolicy.sensitivity.probes.weight_error import weight_errors
from bitpolicy.sensitivity.records import Piece, Records, settings_key
from bitpolicy.sensitivity.rounding.candidates import Candidate, candidates
from bitpolicy.sensitivity.rounding.corrections import beyond_range
from bitpolicy.sensitivity.rounding.kept_calibration import KeptCalibration
from bitpolicy.sensitivity.rounding.rounding_pass import RoundingPass
from bitpolicy.sensitivity.samples import Sample, fingerprint
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.reference import ReferencePass, reference_part
from bitpolicy.sensitivity.trajectory.trajectories import LoopError, Trajectories
from bitpolicy.sensitivity.workers import complete

SHARED = "adjoint probe, shared vectors"  # what the progress bar of `ProbeRun.split` is called
PROBES = ("adjoint", "stepwise", "ablation", "weight")
_LARGE = 500_000_000  # parameters; from here on models are also checkpointed inside, block by block
HESSIAN_SAMPLES = 8
_ROUNDING = 2  # grows when quantizers make other codes than they did: what was kept before is not mixed with it
_OUTLIER = 30.0  # times the median sketch: one that sees so much more than the others is worth a word


@dataclass(frozen=True)
class ProbeSettings:
    """What a probe is to do.

    Attributes:
        probe: one of PROBES.
        samples: calibration trajectories.
        vectors: random directions a sample, for the adjoint and the stepwise probe.
        shared: directions common to all samples, for `ProbeRun.split`.
        quantizers: who rounds; of several, the best by the score is kept for each layer and format.
        compute: of packed layers; one that rounds inputs makes that a part of their error.
    """

    probe: str
    samples: tuple[Sample, ...]
    vectors: int = 2
    shared: int = 8
    quantizers: tuple[str, ...] = (RTN,)
    compute: Compute = Compute.EXACT

    def __post_init__(self) -> None:
        if self.probe not in PROBES:
            raise BitPolicyError(f"unknown probe {self.probe!r}; write any of {', '.join(PROBES)}")
        if len(self.quantizers) > 1 and self.probe in ("ablation", "weight"):
            raise BitPolicyError(
                f"the {self.probe} probe does not choose between quantizers; name one with --quantizer, or take "
                "--probe adjoint"
            )
        if not self.samples or self.vectors < 1 or self.shared < 1:
            raise BitPolicyError(
                f"a probe needs samples and vectors; got {len(self.samples)} samples, {self.vectors} vectors, "
                f"{self.shared} shared"
            )


def is_large(trajectories: Trajectories) -> bool:
    """Whether what is studied and run is so large that gradients take checkpoints inside the models, too."""
    models = [*trajectories.denoisers, *trajectories.outside.values()]
    return sum(p.numel() for model in models for p in model.parameters()) >= _LARGE


class ProbeRun:
    """One probe of one pipeline, resumable from `folder`.

    Args:
        trajectories: the pipeline with its call arguments.
        inventory: the layers under study.
        formats: candidate formats; only the packed ones are scored.
        storage: dtype of the stored weights.
        weights: a hash of everything in the pipeline that the numbers depend on.
        folder: where finished pieces are kept.
        stages: progress and timing.
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
        self._candidates = candidates(formats, settings.quantizers)
        self._settings, self._stages = settings, stages
        self._large = is_large(trajectories)
        self._held: References | None = None
        self._folder = folder / settings_key(self._identity(weights))
        self._records = Records(self._folder)

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
        """The mean inputs and the signal's power over the calibration samples."""
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
            return replace(found, calibration=KeptCalibration(found.calibration, self._rounding.files()))

    @property
    def _rounding(self) -> RoundingPass:
        samples, folder = self._settings.samples[:HESSIAN_SAMPLES], self._folder / "rounded"
        return RoundingPass(
            self._trajectories, self._candidates, self._storage, samples, self._large, folder, self._stages
        )

    def table(self, reference: ReferencePass) -> SensitivityTable:
        """The scores of every layer in every packed format.

        Where the sampling loop cannot be differentiated, the stepwise probe takes the adjoint one's place, with a
        warning on stderr.
        """
        with self._stages.timed("probe"):
            try:
                table = self._scores(self._settings.probe, reference)
            except LoopError as error:
                if outside := ", ".join(self._trajectories.outside):
                    raise BitPolicyError(f"{error}; leave {outside} out, or take --probe ablation") from error
                self._stages.warn(
                    f"{error}; each step is probed alone instead, which knows nothing of what the sampler makes of it"
                )
                table = self._scores("stepwise", reference)
        self._warn_of_outliers(table)
        corrected = table.corrected.clone()
        corrected[[not self._correctable(layer, reference) for layer in self._inventory]] = False
        corrected = self._storable(replace(table, corrected=corrected), reference)
        cost = self._cost(table.probe, reference, 0)
        return replace(table, corrected=corrected, cost=cost, compute=self._settings.compute)

    @staticmethod
    def _correctable(layer: Layer, reference: ReferencePass) -> bool:
        """Whether correcting can do no harm: there is no bias, or its mean input is known."""
        return not layer.has_bias or layer.name in reference.calibration

    def _storable(self, table: SensitivityTable, reference: ReferencePass) -> torch.Tensor:
        """`table.corrected` without the biases that the storage dtype cannot hold once they are corrected."""
        layers, corrected = self._trajectories.target.layers, table.corrected.clone()
        names = []
        for place in beyond_range(table, layers, reference.calibration, self._storage):
            corrected[place] = False
            names.append(table.layers[place[0]])
        if names:
            self._stages.warn(left_as_they_were(list(dict.fromkeys(names)), self._storage))
        return corrected

    def _scores(self, probe: str, reference: ReferencePass) -> SensitivityTable:
        names = [layer.name for layer in self._inventory]
        if probe == "adjoint":
            directions = [Random(k) for k in range(self._settings.vectors)]
            sketches = [s for of_sample in self._sketches(reference, directions, self._candidates) for s in of_sample]
            return SensitivityTable.from_sketches(names, self._candidates, sketches, reference.latent_power)
        if probe == "stepwise":
            local = self._local_sketches(reference, self._candidates)
            power = float(torch.stack([s.power.sum() for s in local]).double().mean())
            return SensitivityTable.from_sketches(names, self._candidates, [s.sketch for s in local], power, "stepwise")
        if probe == "ablation":
            return self._ablated(reference)
        with self._stages.bar(1, "weight probe") as advance:
            error = weight_errors(
                self._trajectories.target,
                self._candidates,
                self._storage,
                reference.calibration,
                self._settings.compute,
            )
            advance()
        corrected = torch.ones_like(error, dtype=torch.bool)
        return SensitivityTable("weight", tuple(names), self._formats, error, corrected, **self._one_quantizer())

    def _one_quantizer(self) -> dict[str, Any]:
        """Of a table whose probe tries one quantizer."""
        return {"quantizers": self._settings.quantizers}

    def _cost(self, probe: str, reference: ReferencePass, measured: int) -> Cost:
        samples, vectors = len(self._settings.samples), self._settings.vectors
        once = samples * reference.calls
        biases = sum(1 + layer.has_bias for layer in self._inventory)
        of_probe = {
            "adjoint": samples * adjoint_forwards(reference.calls, vectors, self._large),
            "stepwise": samples * stepwise_forwards(reference.calls, vectors),
            "ablation": once * biases * len(self._formats),
            "weight": 0,
        }[probe]
        return Cost(once, of_probe, measured * once, once * len(self._inventory) * len(self._formats))

    def _sketches(
        self,
        reference: ReferencePass,
        directions: Sequence[Direction],
        wanted: Sequence[Candidate],
        label: str = "adjoint probe",
    ) -> list[list[Sketch]]:
        """The sketches of each sample in turn, one for each direction.

        Args:
            label: of the progress bar.
        """
        samples = self._settings.samples
        probe = AdjointProbe(
            self._trajectories,
            wanted,
            reference.calibration,
            self._storage,
            recompute_inside=self._large,
            compute=self._settings.compute,
        )
        work = {f"sketch-{i}-{d.name}": (i, d) for i, d in itertools.product(range(len(samples)), directions)}

        def make(names: Sequence[str]) -> Iterator[tuple[str, Piece]]:
            with self._stages.bar(len(names), label) as advance:
                for i, group in itertools.groupby(names, key=lambda name: work[name][0]):
                    of_sample = list(group)
                    for name, s in zip(
                        of_sample, probe.sketches(samples[i], [work[n][1] for n in of_sample]), strict=True
                    ):
                        yield name, s.tensors()
                        advance()

        pieces = complete(self._records, list(work), make).values()
        found = equally_long([Sketch.from_tensors(piece) for piece in pieces])
        return [found[k : k + len(directions)] for k in range(0, len(found), len(directions))]

    def _local_sketches(self, reference: ReferencePass, wanted: Sequence[Candidate]) -> list[LocalSketch]:
        """Every stepwise sketch, in sample order."""
        samples, vectors = self._settings.samples, range(self._settings.vectors)
        probe = StepwiseProbe(self._trajectories, wanted, reference.calibration, self._storage, self._settings.compute)
        work = {f"local-{i}-{k}": (i, k) for i, k in itertools.product(range(len(samples)), vectors)}

        def make(names: Sequence[str]) -> Iterator[tuple[str, Piece]]:
            for name in self._stages.track(names, "stepwise probe"):
                i, k = work[name]
                (local,) = probe.sketches(samples[i], [k])
                yield name, {**local.sketch.tensors(), "power": local.power}

        pieces = complete(self._records, list(work), make).values()
        found = equally_long([Sketch.from_tensors(piece) for piece in pieces])
        powers = torch.nn.utils.rnn.pad_sequence([piece["power"] for piece in pieces], batch_first=True)
        return [LocalSketch(sketch, power) for sketch, power in zip(found, powers, strict=True)]

    def split(self, reference: ReferencePass) -> ErrorSplit:
        """What each layer's error is made of, from directions that all samples share.

        Raises:
            BitPolicyError: there are fewer than two samples.
            LoopError: the sampling loop cannot be differentiated.
        """
        if len(self._settings.samples) < 2:
            raise BitPolicyError("a bias is what samples have in common: give --samples 2 or more")
        with self._stages.timed("split"):
            directions: list[Direction] = [Shared(k) for k in range(self._settings.shared)]
            wanted = candidates(self._formats, self._settings.quantizers[:1])
            found = self._sketches(reference, [*directions, Signal()], wanted, SHARED)
            shared, signal = [of_sample[:-1] for of_sample in found], [of_sample[-1] for of_sample in found]
            return ErrorSplit.of(shared, signal, self._local_sketches(reference, wanted), reference.latent_power)

    def measure(
        self, policies: Mapping[str, Mapping[str, Choice]], reference: ReferencePass, label: str, images: bool = False
    ) -> list[Measured]:
        """The measured error of each policy; layers it does not name stay as they are.

        Args:
            policies: by a name for the record.
            label: of the progress bar.
            images: decode, too, and measure the images' error.
        """

        def make(names: Sequence[str]) -> Iterator[tuple[str, Piece]]:
            for name in self._stages.track(names, label):
                arguments = (reference.calibration, self._storage, self._settings.samples, self._references(images))
                found = ablate(self._trajectories, policies[name], *arguments, self._settings.compute)
                yield name, found.tensors()

        return [Measured.from_tensors(t) for t in complete(self._records, list(policies), make).values()]

    def remeasured(
        self, table: SensitivityTable, reference: ReferencePass, places: Iterable[tuple[int, int]]
    ) -> SensitivityTable:
        """`table` with the errors at (layer, column of the format) measured by ablation."""
        done = table.measured if table.measured is not None else torch.zeros_like(table.corrected)
        wanted = [place for place in dict.fromkeys(places) if not done[place]]
        if not wanted:
            return table
        with self._stages.timed("re-measure"):
            alone = {alone_name(table, *place): {table.layers[place[0]]: _choice(table, *place)} for place in wanted}
            found = self.measure(alone, reference, "re-measuring")
        errors = [float(m.power.mean()) / reference.latent_power for m in found]
        table = table.remeasured(dict(zip(wanted, errors, strict=True)))
        assert table.measured is not None
        return replace(table, cost=self._cost(table.probe, reference, int(table.measured.sum())))

    def _ablated(self, reference: ReferencePass) -> SensitivityTable:
        """Every layer in every format with either bias, measured."""
        names = tuple(layer.name for layer in self._inventory)
        shape = (len(names), len(self._formats))
        biases = [
            SensitivityTable(
                "ablation",
                names,
                self._formats,
                torch.zeros(shape),
                torch.full(shape, corrected),
                **self._one_quantizer(),
            )
            for corrected in (False, True)
        ]
        places = [
            (i, j)
            for i, j in itertools.product(range(shape[0]), range(shape[1]))
            if self._formats[j].fits(self._inventory[i].shape)
        ]
        both = [layer.has_bias and layer.name in reference.calibration for layer in self._inventory]
        work = {
            alone_name(table, *place): {names[place[0]]: _choice(table, *place)}
            for place in places
            for table in (biases if both[place[0]] else biases[:1])
        }
        found = dict(zip(work, self.measure(work, reference, "ablation probe"), strict=True))
        power = torch.zeros(2, *shape, dtype=torch.float64)
        for place in places:
            plain = found[alone_name(biases[0], *place)]
            fixed = found.get(alone_name(biases[1], *place), plain)
            power[:, *place] = torch.stack([plain.power.mean(), fixed.power.mean()]) / reference.latent_power
        least, corrected = power.amin(0), power[1] <= power[0]
        return SensitivityTable("ablation", names, self._formats, least, corrected, **self._one_quantizer())

    def _references(self, images: bool) -> References:
        if self._held is None or images != (self._held.images is not None):
            self._held = References.of(self._trajectories, self._settings.samples, images)
        return self._held

    def _warn_of_outliers(self, table: SensitivityTable) -> None:
        """Sketches are kept whatever they say; one that says far more than the others is named."""
        if table.sketches is None or len(table.sketches) < 4:
            return
        power = table.sketches.double().square().sum((1, 2))
        worst = int(power.argmax())
        if power[worst] > _OUTLIER * power.median():
            sample = self._settings.samples[worst // self._settings.vectors]
            self._stages.warn(
                f"one sketch of {len(power)} is {float(power[worst] / power.median()):.0f} times the median: "
                f"{sample.prompt!r}, seed {sample.seed}; more --samples make the scores steadier"
            )


def _choice(table: SensitivityTable, layer: int, column: int) -> Choice:
    return table.choice(layer, table.formats[column])


def alone_name(table: SensitivityTable, layer: int, column: int) -> str:
    """What the record of one quantized layer is called."""
    choice = _choice(table, layer, column)
    bias = "corrected" if choice.bias_correction else "plain"
    rounded = "" if choice.quantizer == RTN else f"-{choice.quantizer}"
    return f"ablation-{table.layers[layer]}-{choice.format.name}-{bias}{rounded}"
