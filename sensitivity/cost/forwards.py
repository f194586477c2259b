"""What a probe costs, counted in forward passes of the denoiser.

A backward pass counts as two forwards: each matrix product has one for the gradient of its input and one for that of
its weight. A checkpointed call is run once more before its backward pass, one with checkpoints inside twice more. With
K directions a trajectory of C calls costs C (1 + 3 K), or C (1 + 4 K); ablation costs C for each layer and format.
"""

from __future__ import annotations

from dataclasses import dataclass

BACKWARD = 2


@dataclass(frozen=True)
class Cost:
    """Denoiser forwards, one sample each.

    Attributes:
        reference: of the reference pass.
        probe: of the scores.
        measured: of what was re-measured by ablation.
        ablation: what ablation of every layer in every format would have cost on the same samples.
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
        """How many times cheaper than ablation of everything."""
        return self.ablation / self.total

    def __str__(self) -> str:
        return (
            f"{self.total:,} denoiser forwards ({self.reference:,} reference, {self.probe:,} probe, "
            f"{self.measured:,} re-measured), {self.gain:.1f}x below ablation's {self.ablation:,}"
        )


def adjoint_forwards(calls: int, directions: int, recompute_inside: bool) -> int:
    """Of one sample: the forward trajectory, then for each direction the recomputation and the backward pass."""
    return calls * (1 + directions * (1 + int(recompute_inside) + BACKWARD))


def stepwise_forwards(calls: int, vectors: int) -> int:
    """Of one sample: a forward and a backward pass of each call for each vector."""
    return calls * vectors * (1 + BACKWARD)
