"""The adjoint probe: what every layer's quantization error does to the final latent, from a few backward passes.

To first order, a change dW of layer l's weight moves the final latent x_0 by J_l dW. If an autoencoder is studied, x_0
is the image instead. Draw a probe vector v ~ N(0, I) of the same shape as x_0. One backward pass of <v, x_0> through
the whole sampling loop gives G_l = J_l^T v for every layer at once, and

    s(l, f) = <G_l, Q_f(W_l) - W_l> = <v, J_l dW>,      E_v[s(l, f)^2]          = |dx_0(l, f)|^2,
                                                        E_v[s(l, f) s(l', f')]  = <dx_0(l, f), dx_0(l', f')>.

This is the adjoint method applied to the sampler, with Hutchinson's estimator (1990) of the norm. A sketch s costs one
dot product per format, and the gradient G_l is summed over the calls of the trajectory before it is multiplied
(`bitpolicy.sensitivity.sketches.probe_memory`). The same pass measures the effect of 8-bit inputs
(`bitpolicy.sensitivity.sketches.input_rounding`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.cost.forwards import adjoint_forwards
from bitpolicy.sensitivity.probes.compute_range import advice
from bitpolicy.sensitivity.probes.probe import Probe
from bitpolicy.sensitivity.records import Piece
from bitpolicy.sensitivity.rounding.candidates import Candidate
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches.directions import Direction, Random, signal_of
from bitpolicy.sensitivity.sketches.input_rounding import InputRounding
from bitpolicy.sensitivity.sketches.probe_memory import BY_STEP, ProbeMemory
from bitpolicy.sensitivity.sketches.sketch import Sketch, SketchRecorder, equally_long, only_these_require_grad
from bitpolicy.sensitivity.sketches.weight_changes import WeightChanges
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.checkpointed_calls import CheckpointedCalls
from bitpolicy.sensitivity.trajectory.scaled_backward import backward, scales_for
from bitpolicy.sensitivity.trajectory.trajectories import LoopError, Trajectories
from bitpolicy.sensitivity.workers import complete


class AdjointProbe(Probe):
    """Scores layers by sketches along random probe vectors, a few per sample."""

    name = "adjoint"
    chooses_quantizer = True
    outside_loop = True
    takes_gradients = True

    def table(self) -> SensitivityTable:
        """The scores, with the sketches that they are computed from."""
        inputs = self._inputs
        of_samples = self.sketches([Random(k) for k in range(inputs.vectors)], inputs.memory_of_sums())
        sketches = [sketch for of_sample in of_samples for sketch in of_sample]
        return SensitivityTable.from_sketches(inputs.names, inputs.candidates, sketches, inputs.reference.latent_power)

    def forwards(self) -> int:
        inputs = self._inputs
        of_sample = adjoint_forwards(inputs.reference.calls, inputs.vectors, inputs.recompute_inside)
        return len(inputs.samples) * of_sample

    def sketches(
        self, directions: Sequence[Direction], memory: ProbeMemory, label: str = "adjoint probe"
    ) -> list[list[Sketch]]:
        """The sketches of each sample in turn, one per probe vector.

        Args:
            directions: the probe vectors. Random ones are for sketches of the whole trajectory, the others for sketches
                by step: records are named after the direction.
            memory: decides between the two.
            label: of the progress bar.
        """
        inputs = self._inputs
        maker = AdjointSketches(
            inputs.trajectories,
            inputs.candidates,
            recompute_inside=inputs.recompute_inside,
            quantization=inputs.quantization,
            memory=memory,
        )
        work = {f"sketch-{i}-{d.name}": (i, d) for i, d in itertools.product(range(len(inputs.samples)), directions)}

        def make(names: Sequence[str]) -> Iterator[tuple[str, Piece]]:
            with inputs.stages.bar(len(names), label) as advance:
                for i, group in itertools.groupby(names, key=lambda name: work[name][0]):
                    of_sample = list(group)
                    made = maker.sketches(inputs.samples[i], [work[name][1] for name in of_sample])
                    for name, sketch in zip(of_sample, made, strict=True):
                        yield name, sketch.tensors()
                        advance()

        pieces = complete(inputs.records, list(work), make).values()
        found = equally_long([Sketch.from_tensors(piece) for piece in pieces])
        return [found[k : k + len(directions)] for k in range(0, len(found), len(directions))]


class AdjointSketches:
    """Computes the sketches of one pipeline, one trajectory at a time.

    Args:
        trajectories: the pipeline with its call arguments.
        candidates: packed formats to score, each with its rounding method.
        quantization: under activation quantization, the error of a layer includes the rounding of its inputs.
        recompute_inside: also checkpoint inside the denoiser, block by block. This takes less memory and one more
            forward.
        memory: what is summed and kept.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        candidates: Sequence[Candidate],
        *,
        quantization: Quantization,
        recompute_inside: bool = False,
        memory: ProbeMemory = BY_STEP,
    ) -> None:
        self._trajectories, self._recompute_inside = trajectories, recompute_inside
        self._layers = trajectories.target.layers
        self._inputs = InputRounding(self._layers, candidates, quantization.compute)
        changes = WeightChanges(self._layers, candidates, quantization=quantization, room=memory.packed)
        outside, amounts = trajectories.outside_layers, self._inputs.amounts
        self._recorder = SketchRecorder(self._layers, changes, len(candidates), memory.summed, outside, amounts)

    def sketches(self, sample: Sample, directions: Sequence[Direction]) -> Iterator[Sketch]:
        """One sketch per probe vector, all from one forward trajectory.

        Raises:
            LoopError: the sampling loop cannot be differentiated from end to end.
            BitPolicyError: a gradient is not finite.
        """
        self._trajectories.end(sample)  # may take a run without gradients, which must come before the calls below
        calls = CheckpointedCalls(self._trajectories, self._at_step)
        with (
            only_these_require_grad(self._trajectories, self._layers),
            calls.installed(self._recompute_inside),
            self._inputs.installed(),
        ):
            signal = self._trajectories.differentiable_signal(sample)
            require_uncut(calls.cut)
            for i, direction in enumerate(directions):
                v = direction.vector(signal, sample)
                yield self._backward(signal, v, calls, keep=i + 1 < len(directions))

    def _at_step(self, step: int) -> None:
        self._recorder.step = step

    def _backward(self, signal: torch.Tensor, v: torch.Tensor, calls: CheckpointedCalls, keep: bool) -> Sketch:
        where = None
        scales = scales_for(signal, self._trajectories.denoisers)
        for scale in scales:
            last = scale == scales[-1]
            calls.new_backward()
            most = max(self._trajectories.steps, max(calls.steps, default=0) + 1)
            with self._recorder.recording(most, signal.device):
                backward(signal, v, scale, keep=keep or not last)
            require_uncut(calls.not_redone | (calls.steps - self._recorder.reached))
            require_reached(calls.called - self._recorder.reached_outside)
            where = self._recorder.not_finite()
            if where is None:
                return self._recorder.sketch(scale, along=float((v * signal_of(signal)).sum()))
        assert where is not None
        remedy = advice(self._trajectories.target.dtype)
        raise BitPolicyError(f"{where}; {remedy}, or use --probe ablation")


def require_reached(missed: set[str]) -> None:
    """Check that a gradient reaches every component that is called.

    Args:
        missed: names of the components that are called and that no gradient reaches.

    Raises:
        BitPolicyError: there are any.
    """
    if missed:
        names = ", ".join(sorted(missed))
        raise BitPolicyError(
            f"no gradient gets through the pipeline's call of {names}; leave {names} out of --component, or use "
            "--probe ablation"
        )


def require_uncut(cut: set[int]) -> None:
    """Check that a gradient reaches every step.

    Args:
        cut: the steps that no gradient reaches.

    Raises:
        LoopError: there are any.
    """
    if cut:
        raise LoopError(f"the sampling loop passes no gradient back to step {max(cut) + 1}")
