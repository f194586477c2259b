"""The cost of a probe, counted in forward passes of the denoiser.

A backward pass counts as two forwards: each matrix product needs one for the gradient of its input and one for that of
its weight. A checkpointed call runs once more before its backward pass, or twice more with checkpoints inside. With K
probe vectors, a trajectory of C calls costs C (1 + 3 K), or C (1 + 4 K) with checkpoints inside. Ablation costs C for
each layer and format.
"""

from __future__ import annotations

from dataclasses import dataclass

BACKWARD = 2


@dataclass(frozen=True)
class Cost:
    """Denoiser forwards of a probe, each for one sample.

    Attributes:
        reference: for the reference pass.
        probe: for the scores.
        measured: for re-measuring by ablation.
        ablation: what ablating every layer in every format would have cost on the same samples.
    """

    reference: int
    probe: int
    measured: int
    ablation: int

    @property
    def total(self) -> int:
        return self.reference + self.probe + self.measured

    @property
    def gain(self) -> float:
        """How many times cheaper this is than ablating every layer in every format."""
        return self.ablation / self.total

    def __str__(self) -> str:
        return (
            f"{self.total:,} denoiser forwards ({self.reference:,} reference, {self.probe:,} probe, "
            f"{self.measured:,} re-measured), {self.gain:.1f}x below ablation's {self.ablation:,}"
        )


def adjoint_forwards(calls: int, directions: int, recompute_inside: bool) -> int:
    """Forwards for one sample: the trajectory, then the recomputation and the backward pass for each probe vector."""
    return calls * (1 + directions * (1 + int(recompute_inside) + BACKWARD))


def stepwise_forwards(calls: int, vectors: int) -> int:
    """Forwards for one sample: a forward and a backward pass of each call for each probe vector."""
    return calls * vectors * (1 + BACKWARD)
