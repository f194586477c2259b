"""What quantizing does to a layer's parameters: dW = Q(W) - W and the db that corrects its mean, per candidate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from bitpolicy.kernels.bias_correction import bias_shift
from bitpolicy.kernels.layers import Quantizable
from bitpolicy.policies.apply import stored_weight
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.policy import Choice
from bitpolicy.sensitivity.candidates import Candidate

_CACHE_BYTES = 2**27  # for each candidate: of dW in float32 that are kept; the others are computed anew for each use
_MOST = 2**31  # for all of them: many formats take no more memory than sixteen


class WeightChanges:
    """dW and db of every layer for every candidate; zero where a format does not fit the layer.

    Args:
        calibration: E[x] per layer, for db; a layer without one is not corrected (some models use a layer's weight
            without calling the layer). And what was rounded for the candidates.
        storage: dtype of the stored weights; changes are taken against the weight in this dtype.
    """

    def __init__(
        self,
        layers: Mapping[str, Quantizable],
        candidates: Sequence[Candidate],
        calibration: Calibration,
        storage: torch.dtype,
    ) -> None:
        self._layers, self._candidates, self._calibration, self._storage = layers, candidates, calibration, storage
        self._biases: dict[str, torch.Tensor] = {}
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._room = min(_CACHE_BYTES * len(candidates), _MOST)

    def weight_products(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """<G_W, dW> for each candidate, float32, shape (candidates)."""
        flat = gradient.float().flatten()
        return torch.stack([torch.dot(delta, flat) for delta in self._deltas(name)])

    def bias_products(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """<G_b, db> for each candidate, float32, shape (candidates)."""
        if name not in self._biases:
            self._biases[name] = self._shifts(name)
        return self._biases[name] @ gradient.float().to(self._biases[name].device)

    def _deltas(self, name: str) -> Iterator[torch.Tensor]:
        """dW of each candidate, float32, flat."""
        if name in self._kept:
            yield from self._kept[name]
            return
        nbytes = self._layers[name].weight.numel() * len(self._candidates) * 4
        if nbytes > self._room:
            yield from (self._delta(name, candidate) for candidate in self._candidates)
            return
        self._room -= nbytes
        self._kept[name] = [self._delta(name, candidate) for candidate in self._candidates]
        yield from self._kept[name]

    def _delta(self, name: str, candidate: Candidate) -> torch.Tensor:
        weight, format = self._layers[name].weight.detach().to(self._storage), candidate.format
        if not format.fits(weight.shape):
            return torch.zeros(weight.numel(), device=weight.device)
        stored = stored_weight(name, weight, Choice(format, quantizer=candidate.quantizer), self._calibration)
        return format.dequantize(stored, weight.shape, torch.float32).sub_(weight).flatten()

    def _shifts(self, name: str) -> torch.Tensor:
        """db of each candidate, float32, shape (candidates, out)."""
        layer = self._layers[name]
        if name not in self._calibration:
            return torch.zeros(len(self._candidates), layer.weight.shape[0], device=layer.weight.device)
        deltas = (delta.view(layer.weight.shape) for delta in self._deltas(name))
        return torch.stack([bias_shift(layer, delta, self._calibration[name]) for delta in deltas])
