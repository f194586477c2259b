"""Round every layer to every candidate whose quantizer takes more than a moment, once, and keep what it made.

Hessians of all layers at once would be many times the model: layers are taken in parts whose Hessians fit in a set
memory, with the backward passes of `hessians` anew for each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from bitpolicy.kernels.gptq import Curvature, gptq
from bitpolicy.kernels.grid import GridFormat
from bitpolicy.kernels.layers import Quantizable, quantizable_layers
from bitpolicy.kernels.quantizers import HESSIANS, RTN, quantize_data_free
from bitpolicy.policies.calibration import rounded_key
from bitpolicy.policies.policy import Choice
from bitpolicy.sensitivity.candidates import Candidate
from bitpolicy.sensitivity.hessians import Moments, has_hessian

_MEMORY = 2**30  # bytes of second moments held at a time
_WIDEST = 12_288  # K beyond which a Hessian takes too long to factorize; such a layer is rounded by `mse`
_INSTEAD = "mse"


def parts(denoiser: nn.Module, quantizers: Sequence[str]) -> list[list[str]]:
    """The layers, in order, in parts that are rounded together."""
    found: list[list[str]] = [[]]
    used = 0
    for name, layer in quantizable_layers(denoiser):
        nbytes = 8 * layer.weight[0].numel() ** 2 if needs_hessian(layer, quantizers) else layer.weight.numel()
        if found[-1] and used + nbytes > _MEMORY:
            found.append([])
            used = 0
        found[-1].append(name)
        used += nbytes
    return found


def needs_hessian(layer: Quantizable, quantizers: Sequence[str]) -> bool:
    """Whether one of the quantizers wants it, and the layer can have it."""
    return any(q in HESSIANS for q in quantizers) and has_hessian(layer) and layer.weight[0].numel() <= _WIDEST


def rounded(
    name: str, weight: torch.Tensor, wanted: Sequence[Candidate], moments: Moments | None
) -> dict[str, torch.Tensor]:
    """What every candidate but round to nearest makes of one weight, by `rounded_key`, on the CPU.

    Args:
        weight: in the storage dtype.
        moments: of the layer's inputs; without them what wants a Hessian is rounded by `mse`.
    """
    curvature = _Curvatures(moments)
    found: dict[str, torch.Tensor] = {}
    for candidate in wanted:
        format = candidate.format
        if candidate.quantizer == RTN or not isinstance(format, GridFormat) or not format.fits(weight.shape):
            continue
        kind = HESSIANS.get(candidate.quantizer)
        if kind is not None and moments is not None:
            tensors = gptq(format, weight, curvature.of(kind, format))
        else:
            tensors = quantize_data_free(_INSTEAD if kind else candidate.quantizer, format, weight)
        choice = Choice(format, quantizer=candidate.quantizer)
        found |= {rounded_key(name, choice, suffix): tensor.cpu() for suffix, tensor in tensors.items()}
    return found


class _Curvatures:
    """Prepared Hessians of one layer, each made once: formats that are rotated alike share one."""

    def __init__(self, moments: Moments | None) -> None:
        self._moments = moments
        self._made: dict[tuple[str, int], Curvature] = {}

    def of(self, kind: str, format: GridFormat) -> Curvature:
        assert self._moments is not None
        key = kind, format.rotation
        if key not in self._made:
            self._made[key] = Curvature.of(format.rotated_hessian(self._moments.hessian(kind)))
        return self._made[key]


def rounded_layers(
    denoiser: nn.Module,
    names: Sequence[str],
    wanted: Sequence[Candidate],
    storage: torch.dtype,
    moments: Mapping[str, Moments],
    after_each: Callable[[], None],
) -> dict[str, torch.Tensor]:
    """`rounded` of the layers `names`."""
    layers = dict(quantizable_layers(denoiser))
    return dict(_all(((n, layers[n]) for n in names), wanted, storage, moments, after_each))


def _all(
    layers: Iterator[tuple[str, Quantizable]],
    wanted: Sequence[Candidate],
    storage: torch.dtype,
    moments: Mapping[str, Moments],
    after_each: Callable[[], None],
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, layer in layers:
        yield from rounded(name, layer.weight.detach().to(storage), wanted, moments.get(name)).items()
        after_each()
