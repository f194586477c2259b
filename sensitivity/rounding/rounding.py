"""Rounds every layer to every candidate whose rounding method takes more than a moment.

The Hessians of all layers at once would take many times the memory of the model. So layers are rounded in parts whose
Hessians fit in a fixed amount of memory, and the backward passes of `hessians` are repeated for each part. The result
for one layer and candidate is handed over before the next one is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from bitpolicy.kernels.formats.format import Shape, TensorSpec
from bitpolicy.kernels.formats.grid import GridFormat
from bitpolicy.kernels.layers import Quantizable
from bitpolicy.kernels.quantizers.gptq import Curvature, gptq
from bitpolicy.kernels.quantizers.named import HESSIANS, RTN, quantize_data_free
from bitpolicy.policies.calibration import RoundedKey
from bitpolicy.sensitivity.rounding.candidates import Candidate
from bitpolicy.sensitivity.rounding.hessians import Moments, hessian_shape

_MEMORY = 2**30  # bytes of second moments held at a time; for larger models, the bytes of their weights
_INSTEAD = "mse"  # the rounding method for a layer that is never called


@dataclass(frozen=True)
class _GridCandidate(Candidate):
    format: GridFormat


def parts(layers: Mapping[str, Quantizable], quantizers: Sequence[str]) -> list[list[str]]:
    """The layers, in order, divided into parts that are rounded together."""
    found: list[list[str]] = []
    used, room = 0, max(_MEMORY, sum(layer.weight.nbytes for layer in layers.values()))
    of_each = 8 if needs_gradients(quantizers) else 4
    for name, layer in layers.items():
        groups, blocks, k = hessian_shape(layer)
        nbytes = of_each * groups * blocks * k**2 if needs_hessian(quantizers) else 0
        if not found or used + nbytes > room:
            found.append([])
            used = 0
        found[-1].append(name)
        used += nbytes
    return found


def needs_hessian(quantizers: Sequence[str]) -> bool:
    """Whether any of the rounding methods needs a Hessian."""
    return any(q in HESSIANS for q in quantizers)


def needs_gradients(quantizers: Sequence[str]) -> bool:
    """Whether any of the rounding methods needs gradients of the finished image."""
    return any(HESSIANS.get(q) == "trajectory" for q in quantizers)


def announced(
    name: str, shape: Shape, wanted: Sequence[Candidate], storage: torch.dtype
) -> dict[RoundedKey, TensorSpec]:
    """The specs of what `rounded` yields for a weight of `shape`."""
    return {
        _key(name, candidate, suffix): spec
        for candidate in _kept(wanted, shape)
        for suffix, spec in candidate.format.tensors(shape, storage).items()
    }


def rounded(
    name: str, weight: torch.Tensor, wanted: Sequence[Candidate], moments: Moments | None
) -> Iterator[tuple[RoundedKey, torch.Tensor]]:
    """One weight rounded by every candidate except round to nearest, on the CPU, one candidate at a time.

    Args:
        weight: in the storage dtype.
        moments: of the layer's inputs. Without them, `mse` replaces the methods that need a Hessian.
    """
    alike = [(HESSIANS.get(c.quantizer, ""), c.format.rotation, c) for c in _kept(wanted, weight.shape)]
    for (kind, _), group in groupby(sorted(alike, key=lambda entry: entry[:2]), key=lambda entry: entry[:2]):
        curvature: Curvature | None = None  # for one kind and rotation at a time
        for _, _, candidate in group:
            format = candidate.format
            if kind and moments is not None:
                curvature = curvature or Curvature.of(format.rotated_hessian(moments.hessian(kind)))
                tensors = gptq(format, weight, curvature)
            else:
                tensors = quantize_data_free(_INSTEAD if kind else candidate.quantizer, format, weight)
            yield from ((_key(name, candidate, suffix), tensor.cpu()) for suffix, tensor in tensors.items())


def _kept(wanted: Sequence[Candidate], shape: Shape) -> Iterator[_GridCandidate]:
    """The candidates whose rounding is kept. All others take no time to compute again."""
    for candidate in wanted:
        format = candidate.format
        if candidate.quantizer != RTN and isinstance(format, GridFormat) and format.fits(shape):
            yield _GridCandidate(format, candidate.quantizer)


def _key(name: str, candidate: Candidate, suffix: str) -> RoundedKey:
    return RoundedKey(name, candidate.format.name, candidate.quantizer, suffix)
