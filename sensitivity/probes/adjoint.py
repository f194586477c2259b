"""The adjoint probe: what every layer's quantization error does to the final latent, from a few backward passes.

To first order, a change dW of layer l's weight moves the final latent x_0 by J_l dW. Where an autoencoder is studied,
x_0 stands for the image instead. Draw v ~ N(0, I) of its shape. One backward pass of <v, x_0> through the whole
sampling loop gives G_l = J_l^T v for every layer at once, and

    s(l, f) = <G_l, Q_f(W_l) - W_l> = <v, J_l dW>,      E_v[s(l, f)^2]          = |dx_0(l, f)|^2,
                                                        E_v[s(l, f) s(l', f')]  = <dx_0(l, f), dx_0(l', f')>.

This is the adjoint method applied to the sampler, with Hutchinson's estimator (1990) of the norm. One sketch s costs a
dot product per format. Each layer's gradient is used and freed as soon as it is complete, step by step. What 8-bit
inputs do comes along in the same pass (`bitpolicy.sensitivity.probes.input_rounding`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.kernel import Compute
from bitpolicy.policies.calibration import Calibration
from bitpolicy.sensitivity.probes.compute_range import advice
from bitpolicy.sensitivity.probes.directions import Direction, signal_of
from bitpolicy.sensitivity.probes.input_rounding import InputRounding
from bitpolicy.sensitivity.probes.sketch import Sketch, SketchRecorder, only_these_require_grad
from bitpolicy.sensitivity.probes.weight_changes import WeightChanges
from bitpolicy.sensitivity.rounding.candidates import Candidate
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.checkpointed_calls import CheckpointedCalls
from bitpolicy.sensitivity.trajectory.scaled_backward import backward, scales_for
from bitpolicy.sensitivity.trajectory.trajectories import LoopError, Trajectories


class AdjointProbe:
    """Sketches of one pipeline.

    Args:
        trajectories: the pipeline with its call arguments.
        candidates: packed formats to score, each with its quantizer.
        calibration: E[x] per layer, for the corrected bias.
        storage: dtype of the stored weights; errors are taken against the weight in this dtype.
        recompute_inside: also checkpoint inside the denoiser, block by block: less memory, one more forward.
        compute: of packed layers; under INT8 and FP8 the rounding of their inputs is part of their error.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        candidates: Sequence[Candidate],
        calibration: Calibration,
        storage: torch.dtype,
        recompute_inside: bool = False,
        compute: Compute = Compute.EXACT,
    ) -> None:
        self._trajectories, self._recompute_inside = trajectories, recompute_inside
        self._layers = trajectories.target.layers
        self._inputs = InputRounding(self._layers, candidates, compute)
        changes = WeightChanges(self._layers, candidates, calibration, storage, compute)
        outside, amounts = trajectories.outside_layers, self._inputs.amounts
        self._recorder = SketchRecorder(self._layers, changes, len(candidates), outside, amounts)

    def sketches(self, sample: Sample, directions: Sequence[Direction]) -> Iterator[Sketch]:
        """One sketch for each direction, all from one forward trajectory.

        Raises:
            LoopError: the sampling loop cannot be differentiated from end to end.
            BitPolicyError: its gradient is not finite.
        """
        self._trajectories.end(sample)  # a run without gradients, if it takes one, is none of the calls below
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
        place = f"step {where[0] + 1}" if where[0] >= 0 else "outside the loop"
        remedy = advice(self._trajectories.target.dtype)
        raise BitPolicyError(f"{place}: the gradient of {where[1]} is NaN or Inf; {remedy}, or take --probe ablation")


def require_reached(missed: set[str]) -> None:
    """Raises:
    BitPolicyError: there is a component that is called and that no gradient gets back to.
    """
    if missed:
        names = ", ".join(sorted(missed))
        raise BitPolicyError(
            f"the pipeline calls its {names} where no gradients pass; leave {names} out of --component, or take "
            "--probe ablation"
        )


def require_uncut(cut: set[int]) -> None:
    """Raises:
    LoopError: there is a step that no gradient gets back to.
    """
    if cut:
        raise LoopError(f"the sampling loop passes no gradient back to step {max(cut) + 1}")
