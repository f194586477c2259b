"""Predict how long a search will take and how much memory and disk it needs, from a few measured steps.

The time of a stage is its number of sampling steps times the time of one step, measured just before. The products at
the end of a sketch are scaled up from a layer of median size. The time of rounding is scaled up from a few layers by
the work of `gptq`, K^3 + out K^2 for a weight of shape (out, K). The study stops losing trials early, so its time is an
upper bound. Disk is exact, or an upper bound where it depends on the policy.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from bitpolicy.check import LAYERS, POLICIES
from bitpolicy.kernels.layers import Quantizable
from bitpolicy.kernels.quantizers.named import RTN, parse_quantizer
from bitpolicy.policies.footprint import loaded_bytes
from bitpolicy.policies.measured_compute import measured_compute
from bitpolicy.policies.quantization import Quantization
from bitpolicy.search.target import MEASUREMENTS
from bitpolicy.sensitivity.cost.forwards import BACKWARD
from bitpolicy.sensitivity.cost.step_cost import Timing, peak_of_step, time_plain, time_probed
from bitpolicy.sensitivity.probes.adjoint import AdjointProbe
from bitpolicy.sensitivity.probes.named import PROBES
from bitpolicy.sensitivity.probes.run import SHARED
from bitpolicy.sensitivity.probes.stepwise import LocalSketches, StepwiseProbe
from bitpolicy.sensitivity.rounding.candidates import Candidate, candidates
from bitpolicy.sensitivity.rounding.hessians import Moments, hessian_shape
from bitpolicy.sensitivity.rounding.rounding import announced, needs_gradients, needs_hessian, parts, rounded
from bitpolicy.sensitivity.rounding.rounding_pass import HESSIAN_SAMPLES
from bitpolicy.sensitivity.sketches.probe_memory import ProbeMemory, default_memory, sum_bytes
from bitpolicy.sensitivity.sketches.shrinkage import can_shrink
from bitpolicy.sensitivity.sketches.weight_changes import WeightChanges
from bitpolicy.sensitivity.trajectory.checkpointed_calls import is_large
from bitpolicy.settings import Settings
from bitpolicy.workflow.compare import PICTURES
from bitpolicy.workflow.plan import Plan, memory_of

_FINALISTS = 4  # three from the study, and the exact solution
_TRIED = 3  # layers that are rounded to measure the time


@dataclass(frozen=True)
class Memory:
    """Bytes held at once.

    Attributes:
        weights: all models of the pipeline, as they are in memory.
        probe: in addition, during a step of the probe; if nothing is differentiated, of the reference.
        sums: in addition, while the probe runs: the sums of gradients, and the packed weights that it keeps.
        rounding: in addition to the weights, while layers are rounded.
    """

    weights: int
    probe: int
    sums: int
    rounding: int


@dataclass(frozen=True)
class Disk:
    """Bytes written to the output folder.

    Attributes:
        checkpoint: all components; an upper bound until the policy is known.
        work: rounded weights and records, which stay until the folder is removed.
    """

    checkpoint: int
    work: int

    @property
    def total(self) -> int:
        return self.checkpoint + self.work


class Forecast:
    """What one run will take.

    Nothing is measured before it is needed. Measuring draws a few steps of the reference, differentiates a few, and
    rounds a few layers; it writes nothing. If the pipeline refuses the call, it raises BitPolicyError.
    """

    def __init__(self, settings: Settings, plan: Plan) -> None:
        self._settings, self._plan = settings, plan
        self._layers = plan.trajectories.target.layers
        self._quantizers = parse_quantizer(settings.quantizer)
        self._candidates = candidates(plan.formats, self._quantizers)
        self._large = is_large(plan.trajectories)
        self._sample = plan.split.calibration[0]
        self._kind = PROBES[settings.probe]

    @cached_property
    def _alone(self) -> Timing:
        return time_plain(self._plan.trajectories, [self._sample])

    @cached_property
    def _each(self) -> float:
        """Seconds per trajectory when several share a call."""
        shared = next(self._plan.trajectories.parts(self._plan.split.calibration))
        return time_plain(self._plan.trajectories, shared).trajectory / len(shared)

    def of_search(self, evaluated: bool = True) -> dict[str, float]:
        """Name of a stage's progress bar -> seconds, in the order of the run.

        Args:
            evaluated: whether the run ends by writing the result, reloading it and comparing it on held-out samples.
        """
        return _rounded([*self._decision(), *(self._evaluation() if evaluated and self._decides else ())])

    def of_probe(self, split: bool = False, policies: int = 0) -> dict[str, float]:
        """The same for `bitpolicy probe`.

        Args:
            split: whether errors are split into bias, scale error and noise.
            policies: number of random policies to check the scores with; 0 checks nothing.
        """
        stages = _rounded(self._scores())
        remeasuring = stages.pop("re-measuring", 0.0)
        samples = len(self._plan.split.calibration)
        if split:
            shared = self._settings.shared + 1
            stages[SHARED] = samples * self._sample_seconds(AdjointProbe.name, shared, self._by_step)
            stages["stepwise probe"] = samples * self._sample_seconds(
                StepwiseProbe.name, self._settings.vectors, self._by_step
            )
        if policies:
            stages[LAYERS] = (len(self._layers) * len(self._candidates) + 1) * samples * self._each
            stages[POLICIES] = (policies + 2) * samples * self._each
        return _rounded([*stages.items(), ("re-measuring", remeasuring)])

    def _scores(self) -> Iterator[tuple[str, float]]:
        settings, plan = self._settings, self._plan
        yield "reference", len(plan.split.calibration) * self._each
        yield "rounding", self._rounding()
        yield from self._probe()
        if settings.probe == AdjointProbe.name and settings.budget is not None:
            most = settings.remeasure + settings.remeasure_close
            yield "re-measuring", most * len(plan.split.calibration) * self._each

    @property
    def _decides(self) -> bool:
        """Whether the run produces a policy, and not only the curve."""
        return bool(self._settings.aims)

    @property
    def _unquantized(self) -> bool:
        """Whether the budget holds everything in FP16, so that nothing is probed."""
        return self._settings.budget is not None and self._plan.fits_unquantized and not self._settings.frontier

    def _decision(self) -> Iterator[tuple[str, float]]:
        settings, plan = self._settings, self._plan
        if self._unquantized:
            return
        yield from self._scores()
        if settings.frontier and settings.trials:
            yield "frontier, real images", (settings.frontier + 1) * len(plan.split.search) * self._each
        if settings.budget is not None and settings.trials:
            trials = (settings.trials + 1) * len(plan.split.search) * self._each
            yield "search trials", trials if settings.timeout is None else min(trials, settings.timeout)
            yield "confirming on fresh seeds", (_FINALISTS + 1) * len(plan.split.confirm) * self._each
        elif settings.target_psnr is not None or settings.target_lpips is not None:
            yield "policies measured", (MEASUREMENTS + 1) * len(plan.split.search) * self._each

    def _evaluation(self) -> Iterator[tuple[str, float]]:
        yield "writing the checkpoint", self._requantized(1)
        for pipeline in ("reference", "checkpoint"):
            yield f"held-out, {pipeline}", len(self._plan.split.held_out) * self._each
        if not self._unquantized and not self._plan.given:
            yield "held-out, one format", len(self._plan.split.held_out[:PICTURES]) * self._each

    def _probe(self) -> Iterator[tuple[str, float]]:
        settings, samples = self._settings, len(self._plan.split.calibration)
        packed = sum(1 for format in self._plan.formats if format.packed)
        if self._kind.takes_gradients:
            each = self._sample_seconds(settings.probe, settings.vectors, self._summed)
            yield f"{settings.probe} probe", samples * each
            if can_shrink(samples * settings.vectors, packed, measured_compute(settings.compute).rounds_inputs):
                yield "weight errors", self._requantized(len(self._candidates))
        elif self._kind.data_free:
            yield f"{settings.probe} probe", self._requantized(len(self._candidates))
        else:
            biases = sum(1 + layer.has_bias for layer in self._plan.layers)
            yield f"{settings.probe} probe", (biases * packed + 1) * samples * self._each

    def _sample_seconds(self, probe: str, vectors: int, each: float) -> float:
        """Seconds that the adjoint or the stepwise probe takes per sample.

        Args:
            each: seconds for each vector to differentiate every call of a trajectory alone.
        """
        if probe == StepwiseProbe.name:
            return vectors * each
        inside = self._alone.trajectory if self._large else 0.0
        return self._alone.trajectory + vectors * (each + inside)

    @cached_property
    def _summed(self) -> float:
        """Seconds to differentiate every call of a trajectory alone, for one sketch of the whole trajectory."""
        step = time_probed(self._plan.trajectories, self._stepwise(self._memory), self._sample)
        return step.steps * step.step + self._products(self._memory.summed or ())

    @cached_property
    def _by_step(self) -> float:
        """The same for a sketch by step. The first step also rounds the candidates that stay packed in memory."""
        step = time_probed(self._plan.trajectories, self._stepwise(ProbeMemory(None, self._bytes)), self._sample)
        return step.steps * step.step

    @cached_property
    def _bytes(self) -> int:
        asked = memory_of(self._settings)
        return default_memory(self._plan.trajectories.target.device) if asked is None else asked

    @cached_property
    def _memory(self) -> ProbeMemory:
        return ProbeMemory.summing(self._layers, self._bytes)

    def _stepwise(self, memory: ProbeMemory) -> LocalSketches:
        """Scores of all candidates, rounded to nearest, because the files with `gptq`'s weights do not exist yet."""
        return LocalSketches(self._plan.trajectories, self._alike, quantization=self._quantization, memory=memory)

    @property
    def _alike(self) -> list[Candidate]:
        return [Candidate(candidate.format) for candidate in self._candidates]

    @property
    def _quantization(self) -> Quantization:
        return Quantization(storage=self._plan.source.storage, compute=measured_compute(self._settings.compute))

    def _products(self, names: Collection[str]) -> float:
        """Seconds of the products with the sums of these layers, once for a sketch."""
        ranked = sorted(names, key=lambda name: self._layers[name].weight.numel())
        if not ranked:
            return 0.0
        name = ranked[len(ranked) // 2]
        weight, room = self._layers[name].weight.detach(), 2**63
        changes = WeightChanges(self._layers, self._alike, quantization=self._quantization, room=room)
        changes.weight_products(name, weight)  # rounds it
        start = time.perf_counter()
        changes.weight_products(name, weight)
        each = (time.perf_counter() - start) / weight.numel()
        return each * sum(self._layers[name].weight.numel() for name in names)

    def _rounding(self) -> float:
        """Seconds of the rounding pass: the trajectories for Hessians, and the rounding of each layer."""
        if self._quantizers == (RTN,):
            return 0.0
        seconds = 0.0
        if needs_hessian(self._quantizers):
            backward = BACKWARD + 1 + int(self._large) if needs_gradients(self._quantizers) else 0
            trajectory = self._alone.trajectory * (1 + backward)
            seconds = len(parts(self._layers, self._quantizers)) * self._hessian_samples * trajectory
        ranked = sorted(self._layers.items(), key=lambda entry: _work(entry[1]))
        tried = [ranked[len(ranked) * (2 * i + 1) // (2 * _TRIED)] for i in range(_TRIED)]
        for i, (name, layer) in enumerate(tried):
            alike = ranked[len(ranked) * i // _TRIED : len(ranked) * (i + 1) // _TRIED]
            share = sum(max(_work(other), 1) for _, other in alike) / max(_work(layer), 1)
            seconds += self._one_rounded(name, layer) * share
        return seconds

    def _requantized(self, formats: int) -> float:
        """Seconds to round all weights to nearest in `formats` formats, and to dequantize them."""
        weights = sorted((layer.weight for layer in self._layers.values()), key=torch.numel)
        weight = weights[len(weights) // 2].detach().to(self._plan.source.storage)
        fitting = [format for format in self._plan.formats if format.packed and format.fits(weight.shape)]
        if not fitting:
            return 0.0
        start = time.perf_counter()
        for format in fitting:
            format.dequantize(format.quantize(weight), weight.shape, torch.float32)
        each = (time.perf_counter() - start) / len(fitting) / weight.numel()
        return formats * each * sum(other.numel() for other in weights)

    @property
    def _hessian_samples(self) -> int:
        return min(HESSIAN_SAMPLES, len(self._plan.split.calibration))

    def _one_rounded(self, name: str, layer: Quantizable) -> float:
        """Seconds to round this layer to every candidate."""
        weight, moments = layer.weight.detach().to(self._plan.source.storage), None
        if needs_hessian(self._quantizers):
            moments = Moments.zeros(hessian_shape(layer), weight.device, needs_gradients(self._quantizers))
            groups, _, k = hessian_shape(layer)
            moments.add(torch.randn(2 * k, groups, weight[0].numel(), device=weight.device))
        start = time.perf_counter()
        for _ in rounded(name, weight, self._candidates, moments):
            pass
        return time.perf_counter() - start

    def memory(self) -> Memory:
        """The peak bytes. It runs one more step, and torch counts the allocations."""
        trajectories = self._plan.trajectories
        if self._kind.takes_gradients:
            probe = self._stepwise(ProbeMemory())
            most = peak_of_step(trajectories, lambda: probe.first_steps(self._sample, 1))
        else:
            part = next(trajectories.parts(self._plan.split.calibration))
            most = peak_of_step(trajectories, lambda: next(trajectories.latents(part)))
        return Memory(loaded_bytes(trajectories.pipe), most, self._held(), self._hessians())

    def _held(self) -> int:
        """Bytes of the probe's sums and of the packed weights that it keeps, at most."""
        if not self._kind.takes_gradients:
            return 0
        sums = sum(sum_bytes(self._layers[name]) for name in self._memory.summed or ())
        kept = [candidate.format for candidate in self._candidates if candidate.quantizer == RTN]  # others are mapped
        shapes, storage = [layer.weight.shape for layer in self._layers.values()], self._plan.source.storage
        packed = sum(format.nbytes(shape, storage) for format in kept for shape in shapes if format.fits(shape))
        return sums + min(packed, self._memory.packed)

    def _hessians(self) -> int:
        if self._quantizers == (RTN,) or not needs_hessian(self._quantizers):
            return 0
        sizes = {name: _hessian_bytes(layer) for name, layer in self._layers.items()}
        of_each = 1 + int(needs_gradients(self._quantizers))
        together = parts(self._layers, self._quantizers)
        return of_each * max(sum(sizes[name] for name in part) for part in together)

    def disk(self) -> Disk:
        plan, storage = self._plan, self._plan.source.storage
        others = sum(plan.source.parts.others(storage).values())
        packed = min(plan.budget.nbytes, plan.account.reference) if self._settings.budget else plan.account.reference
        kept = sum(
            spec.nbytes
            for name, layer in self._layers.items()
            for spec in announced(name, layer.weight.shape, self._candidates, storage).values()
        )
        return Disk(packed + others, kept + self._records())

    def _records(self) -> int:
        """Bytes of the probe's records: mean inputs in float64, and the contributions of weights and biases to every
        sketch."""
        samples, split = self._plan.split.calibration, self._plan.trajectories.parts(self._plan.split.calibration)
        means = sum(1 for _ in split) * sum(8 * (layer.weight[0].numel() + 1) for layer in self._layers.values())
        if not self._kind.takes_gradients:
            return means
        numbers = len(self._layers) * len(self._candidates)
        return means + 2 * 4 * len(samples) * self._settings.vectors * numbers


def _rounded(stages: Iterable[tuple[str, float]]) -> dict[str, float]:
    return {name: round(seconds, 3) for name, seconds in stages if seconds > 0}


def _work(layer: Quantizable) -> int:
    groups, blocks, k = hessian_shape(layer)
    return groups * blocks * k**2 * (k + layer.weight.shape[0] // groups)


def _hessian_bytes(layer: Quantizable) -> int:
    groups, blocks, k = hessian_shape(layer)
    return 4 * groups * blocks * k**2
