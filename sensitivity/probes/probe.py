"""The interface of all probes: each scores every layer in every format, at a known cost.

A probe splits its work into named pieces that do not depend on each other. Any process can compute any piece, in any
order; the result is the same to the bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bitpolicy.kernels.formats.format import Format
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.probes.measurement import Ablations
from bitpolicy.sensitivity.records import Piece, Records
from bitpolicy.sensitivity.rounding.candidates import Candidate, candidates
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches.probe_memory import ProbeMemory, default_memory, sum_bytes
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.reference import ReferencePass
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.sensitivity.workers import complete

_SUMMED = "summed-layers"  # the name of the piece


@dataclass(frozen=True)
class ProbeInputs:
    """What a probe works on.

    Attributes:
        trajectories: the pipeline with its call arguments.
        inventory: the layers under study.
        formats: the packed candidates.
        quantizers: the rounding methods to try for each format.
        samples: the calibration samples.
        vectors: probe vectors per sample, for probes that take gradients.
        reference: the unquantized pipeline's pass over the samples.
        quantization: contains the calibration of `reference`.
        ablations: measures policies on the samples.
        records: stores finished pieces.
        stages: shows progress and warnings.
        recompute_inside: whether models are also checkpointed inside, block by block.
        memory: bytes for sums of gradients and packed weights; None for half of what is free.
    """

    trajectories: Trajectories
    inventory: Sequence[Layer]
    formats: tuple[Format, ...]
    quantizers: tuple[str, ...]
    samples: Sequence[Sample]
    vectors: int
    reference: ReferencePass
    quantization: Quantization
    ablations: Ablations
    records: Records
    stages: Stages
    recompute_inside: bool
    memory: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(layer.name for layer in self.inventory)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every format with every rounding method, format by format."""
        return candidates(self.formats, self.quantizers)

    def memory_of_sums(self) -> ProbeMemory:
        """The use of memory for sketches of the whole trajectory.

        Sums of gradients are not rounded as the products of each call are. So that all sketches are made alike, the
        layers to sum are a piece of the probe, unless the given memory decides them.
        """
        layers, nbytes = self.trajectories.target.layers, self._memory_bytes
        found = ProbeMemory.summing(layers, nbytes)
        if self.memory is not None:
            return found

        def make(names: Sequence[str]) -> Iterator[tuple[str, Piece]]:
            for name in names:
                yield name, {"summed": torch.tensor([layer in (found.summed or ()) for layer in layers])}

        flags = complete(self.records, [_SUMMED], make)[_SUMMED]["summed"].tolist()
        summed = frozenset(name for name, flag in zip(layers, flags, strict=True) if flag)
        return ProbeMemory(summed, max(nbytes - sum(sum_bytes(layers[name]) for name in summed), 0))

    def memory_by_step(self) -> ProbeMemory:
        """The use of memory for sketches by step."""
        return ProbeMemory(None, self._memory_bytes)

    @property
    def _memory_bytes(self) -> int:
        return default_memory(self.trajectories.target.device) if self.memory is None else self.memory

    @property
    def trajectory_forwards(self) -> int:
        """Denoiser forwards of one trajectory of every sample."""
        return len(self.samples) * self.reference.calls


class Probe(ABC):
    """One way to score layers.

    Attributes:
        name: as written in options and tables.
        chooses_quantizer: whether it can choose between several rounding methods.
        outside_loop: whether it can score components outside the sampling loop: text encoders, the autoencoder.
        takes_gradients: whether it differentiates along probe vectors.
        data_free: whether it uses only the weights and runs nothing.
    """

    name: ClassVar[str]
    chooses_quantizer: ClassVar[bool]
    outside_loop: ClassVar[bool]
    takes_gradients: ClassVar[bool]
    data_free: ClassVar[bool] = False

    def __init__(self, inputs: ProbeInputs) -> None:
        self._inputs = inputs

    @abstractmethod
    def table(self) -> SensitivityTable:
        """The scores of every layer in every format.

        Raises:
            LoopError: the probe takes gradients, and the sampling loop cannot be differentiated.
            BitPolicyError: a trajectory or a gradient is not finite.
        """

    @abstractmethod
    def forwards(self) -> int:
        """The cost of `table` in forward passes of the denoiser, one sample each."""
