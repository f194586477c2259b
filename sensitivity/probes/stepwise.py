"""The stepwise probe: what every layer's quantization error does to the denoiser's output, call by call.

The probe follows the reference trajectory without gradients, and differentiates each denoiser call alone. With v_t ~
N(0, I) of the output's shape, <v_t, J_{l,t} dW> is a sketch of the error de_t(l, f) that the layer makes in that one
call. The probe does not see how the sampler amplifies this error. The adjoint probe does, and the ratio of the two is
the amplification from the step where an error enters to the end. The stepwise probe also replaces the adjoint probe if
the sampling loop cannot be differentiated. A layer's score is then

    sum_t E|de_t(l, f)|^2 / sum_t E|e_t|^2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.cost.forwards import stepwise_forwards
from bitpolicy.sensitivity.probes.compute_range import advice
from bitpolicy.sensitivity.probes.probe import Probe
from bitpolicy.sensitivity.records import Piece
from bitpolicy.sensitivity.rounding.candidates import Candidate
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches.directions import stream
from bitpolicy.sensitivity.sketches.input_rounding import InputRounding
from bitpolicy.sensitivity.sketches.probe_memory import BY_STEP, ProbeMemory
from bitpolicy.sensitivity.sketches.sketch import Sketch, SketchRecorder, equally_long, only_these_require_grad
from bitpolicy.sensitivity.sketches.weight_changes import WeightChanges
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.decoding import replaced_method
from bitpolicy.sensitivity.trajectory.opened_objects import opened
from bitpolicy.sensitivity.trajectory.trajectories import LoopError, Trajectories
from bitpolicy.sensitivity.workers import complete


@dataclass(frozen=True)
class LocalSketch:
    """A sketch of the denoiser calls of one trajectory.

    Attributes:
        sketch: <v_t, de_t>, summed over the calls or by scheduler step; a step with two calls adds both. Models outside
            the loop contribute none.
        power: |e_t|^2 of the denoiser's output by scheduler step, float32, shape (steps), with a row for models outside
            the loop as in a sketch by step.
    """

    sketch: Sketch
    power: torch.Tensor


class StepwiseProbe(Probe):
    """Scores layers by local sketches along random probe vectors, a few per sample."""

    name = "stepwise"
    chooses_quantizer = True
    outside_loop = False
    takes_gradients = True

    def table(self) -> SensitivityTable:
        """The scores, with the sketches that they are computed from."""
        inputs, local = self._inputs, self.sketches(self._inputs.memory_of_sums())
        power = float(torch.stack([s.power.sum() for s in local]).double().mean())
        sketches = [s.sketch for s in local]
        return SensitivityTable.from_sketches(inputs.names, inputs.candidates, sketches, power, self.name)

    def forwards(self) -> int:
        inputs = self._inputs
        return len(inputs.samples) * stepwise_forwards(inputs.reference.calls, inputs.vectors)

    def sketches(self, memory: ProbeMemory) -> list[LocalSketch]:
        """Every local sketch, in sample order."""
        inputs = self._inputs
        maker = LocalSketches(inputs.trajectories, inputs.candidates, quantization=inputs.quantization, memory=memory)
        numbers = itertools.product(range(len(inputs.samples)), range(inputs.vectors))
        kind = "local-steps" if memory.summed is None else "local"
        work = {f"{kind}-{i}-{k}": (i, k) for i, k in numbers}

        def make(names: Sequence[str]) -> Iterator[tuple[str, Piece]]:
            for name in inputs.stages.track(names, "stepwise probe"):
                i, k = work[name]
                (local,) = maker.sketches(inputs.samples[i], [k])
                yield name, {**local.sketch.tensors(), "power": local.power}

        pieces = complete(inputs.records, list(work), make).values()
        found = equally_long([Sketch.from_tensors(piece) for piece in pieces])
        powers = torch.nn.utils.rnn.pad_sequence([piece["power"] for piece in pieces], batch_first=True)
        return [LocalSketch(sketch, power) for sketch, power in zip(found, powers, strict=True)]


class LocalSketches:
    """Computes the local sketches of one pipeline, one trajectory at a time. Arguments as in `AdjointSketches`."""

    def __init__(
        self,
        trajectories: Trajectories,
        candidates: Sequence[Candidate],
        *,
        quantization: Quantization,
        memory: ProbeMemory = BY_STEP,
    ) -> None:
        self._trajectories = trajectories
        self._layers = trajectories.target.layers
        self._inputs = InputRounding(self._layers, candidates, quantization.compute)
        changes = WeightChanges(self._layers, candidates, quantization=quantization, room=memory.packed)
        outside, amounts = trajectories.outside_layers, self._inputs.amounts
        self._recorder = SketchRecorder(self._layers, changes, len(candidates), memory.summed, outside, amounts)
        self._lead = self._recorder.lead

    def sketches(self, sample: Sample, vectors: Sequence[int]) -> Iterator[LocalSketch]:
        """One local sketch per random stream. Each takes one trajectory."""
        steps = self._trajectories.end(sample).steps
        rows = steps + 1  # some loops end on a call after the last step
        for index in vectors:
            power = self._followed(sample, index, rows)
            where = self._recorder.not_finite()
            if where is not None:
                remedy = advice(self._trajectories.target.dtype)
                raise BitPolicyError(f"{where}; {remedy}, or use --probe ablation")
            used = self._lead + max(steps, max(self._recorder.reached, default=0) + 1)
            yield LocalSketch(self._recorder.sketch().rows(itemgetter(slice(used))), power[:used].cpu())

    def first_steps(self, sample: Sample, steps: int) -> None:
        """Do the work of `sketches` without a result, for a caller that times it and leaves the loop after `steps`."""
        self._followed(sample, 0, steps + 1)

    def _followed(self, sample: Sample, index: int, rows: int) -> torch.Tensor:
        """Follow a trajectory, differentiate each call along its vector from random stream `index`, and record it.

        Returns:
            |e_t|^2, float32, shape (lead + rows).
        """
        device = self._trajectories.target.device
        power = torch.zeros(self._lead + rows, device=device)
        with (
            only_these_require_grad(self._trajectories, self._layers),
            self._recorder.recording(rows, device),
            self._inputs.installed(),
            ExitStack() as stack,
        ):
            streams = (stream(0x57E9, sample.seed, index, call) for call in itertools.count())
            for denoiser in self._trajectories.studied_denoisers:
                stack.enter_context(replaced_method(denoiser, "forward", self._differentiated(streams, power)))
            next(self._trajectories.latents([sample]))
        return power

    def _differentiated(
        self, streams: Iterator[torch.Generator], power: torch.Tensor
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A wrapper for a forward that differentiates its own output, records it and returns it without a graph."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                # a caller that times the first steps has no row for each: those of a prior's loop may come before
                step = self._recorder.step = min(self._trajectories.steps, len(power) - self._lead - 1)
                with torch.inference_mode(False), torch.enable_grad():
                    given, kept = pytree.tree_map(_usable, (args, kwargs))
                    output = original(*given, **kept)
                    leaves, spec = pytree.tree_flatten(opened(output))
                    graphs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
                    if not graphs:
                        raise LoopError("a denoiser's output has no gradient; use --probe ablation")
                    first = graphs[0]
                    v = torch.randn(first.shape, generator=next(streams)).to(first.device)
                    torch.autograd.backward(first, v.to(first.dtype))
                power[self._lead + step] += first.detach().float().square().sum().to(power.device)
                detached = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
                return pytree.tree_unflatten(detached, spec)

            return forward

        return wrap


def _usable(leaf: Any) -> Any:
    """A copy of a tensor from inference mode, which autograd does not accept; anything else as it is."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) and leaf.is_inference() else leaf
