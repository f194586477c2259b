"""The changes to a layer's parameters: dW = Q(W) - W, and the db that corrects the mean, for each candidate.

Q(W) is what the layer multiplies with. Under INT8 compute, that is the stored weight after requantization. The bias is
stored and corrects the stored weight, whatever the compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import Quantizable
from bitpolicy.kernels.quantizers.bias_correction import bias_shift, corrected_bias
from bitpolicy.policies.apply import stored_weight
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.rounded_layers import multiplied_weight, rounds_inputs
from bitpolicy.sensitivity.rounding.candidates import Candidate

_CACHE_BYTES = 2**27  # of float32 dW kept in memory, per candidate; other dW are recomputed at each use
_MOST = 2**31  # for all candidates together, so that many formats take no more memory than sixteen


class WeightChanges:
    """dW and db of every layer for every candidate; zero where a format does not fit the layer.

    Args:
        quantization: changes are relative to the weight in the storage dtype. A layer whose E[x] is missing in the
            calibration is not corrected: some models use a layer's weight without calling the layer.
    """

    def __init__(
        self,
        layers: Mapping[str, Quantizable],
        candidates: Sequence[Candidate],
        *,
        quantization: Quantization,
    ) -> None:
        self._layers, self._candidates, self._compute = layers, candidates, quantization.compute
        self._calibration, self._storage = quantization.calibration, quantization.storage
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

    def input_products(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """<g, Q(x) - x> for each candidate that fits the layer and rounds its inputs, else 0, shape (candidates).

        Args:
            gradient: of the layer's amount, which is <g, Q(x) - x> itself.
        """
        layer, compute = self._layers[name], self._compute
        formats = (candidate.format for candidate in self._candidates)
        rounded = (f.fits(layer.weight.shape) and rounds_inputs(layer, f, compute) for f in formats)
        return torch.stack([gradient * each for each in rounded])

    def _deltas(self, name: str) -> Iterator[torch.Tensor]:
        """dW of each candidate, float32, flat."""
        if name in self._kept:
            yield from self._kept[name]
            return
        nbytes = self._layers[name].weight.numel() * len(self._candidates) * 4
        if nbytes > self._room:
            yield from self._made(name, self._compute)
            return
        self._room -= nbytes
        self._kept[name] = list(self._made(name, self._compute))
        yield from self._kept[name]

    def _made(self, name: str, compute: Compute) -> Iterator[torch.Tensor]:
        return (self._delta(name, candidate, compute) for candidate in self._candidates)

    def _delta(self, name: str, candidate: Candidate, compute: Compute) -> torch.Tensor:
        layer, format = self._layers[name], candidate.format
        weight = layer.weight.detach().to(self._storage)
        if not format.fits(weight.shape):
            return torch.zeros(weight.numel(), device=weight.device)
        stored = stored_weight(name, weight, Choice(format, quantizer=candidate.quantizer), self._calibration)
        return multiplied_weight(layer, format, stored, torch.float32, compute).sub_(weight).flatten()

    def _shifts(self, name: str) -> torch.Tensor:
        """db of each candidate, float32, shape (candidates, out); zero where the storage dtype cannot hold b + db."""
        layer = self._layers[name]
        if name not in self._calibration.input_means:
            return torch.zeros(len(self._candidates), layer.weight.shape[0], device=layer.weight.device)
        requantized = self._compute is Compute.INT8
        deltas = self._made(name, Compute.EXACT) if requantized else self._deltas(name)
        shaped = (delta.view(layer.weight.shape) for delta in deltas)
        shifts = (bias_shift(layer, delta, self._calibration.input_means[name]) for delta in shaped)
        return torch.stack([self._applied(layer, shift) for shift in shifts])

    def _applied(self, layer: Quantizable, shift: torch.Tensor) -> torch.Tensor:
        """`shift`, or zeros if the storage dtype cannot hold the corrected bias."""
        held = layer.bias is None or corrected_bias(layer.bias.detach(), shift, self._storage) is not None
        return shift if held else torch.zeros_like(shift)
