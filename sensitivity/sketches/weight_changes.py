"""The changes to a layer's parameters: dW = Q(W) - W, and the db that corrects the mean, for each candidate.

Q(W) is what the layer multiplies with. Under INT8 compute, that is the stored weight after requantization. The bias is
stored and corrects the stored weight, whatever the compute.

dW never exists as a whole. A product with it takes a few rows at a time: they are unpacked from the candidate's codes,
compared with the weight and multiplied while they are in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bitpolicy.kernels.formats.row_chunks import each_chunk
from bitpolicy.kernels.kernel import PackedWeight
from bitpolicy.kernels.layers import Quantizable
from bitpolicy.kernels.quantizers.bias_correction import corrected_bias
from bitpolicy.policies.apply import mean_error, stored_weight
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.rounded_layers import multiplied_weight, packed_weight, rounds_inputs
from bitpolicy.sensitivity.rounding.candidates import Candidate

_Packed = list[PackedWeight | None]  # one per candidate; None where a format does not fit the layer


class WeightChanges:
    """Products with dW and db of every layer, for every candidate; zero where a format does not fit the layer.

    Args:
        quantization: changes are relative to the weight in the storage dtype. A layer whose E[x] is missing in the
            calibration is not corrected: some models use a layer's weight without calling the layer.
        room: bytes of packed weights that stay in memory. The others are rounded, or read from their files, at each
            use.
    """

    def __init__(
        self,
        layers: Mapping[str, Quantizable],
        candidates: Sequence[Candidate],
        *,
        quantization: Quantization,
        room: int = 0,
    ) -> None:
        self._layers, self._candidates, self._compute = layers, candidates, quantization.compute
        self._calibration, self._storage = quantization.calibration, quantization.storage
        self._biases: dict[str, torch.Tensor] = {}
        self._kept: dict[str, _Packed] = {}
        self._room = room

    def weight_products(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """<G_W, dW> for each candidate, float32, shape (candidates)."""
        whole, candidates = self._layers[name].weight.detach(), self._packed(name)
        products: dict[int, list[torch.Tensor]] = {}

        def work(rows: slice) -> None:
            weight, along = whole[rows].to(self._storage).float(), gradient[rows].float().flatten()
            zero = along.new_zeros(())
            products[rows.start] = [
                zero if packed is None else torch.dot(self._delta(packed.rows(rows), weight).flatten(), along)
                for packed in candidates
            ]

        each_chunk(work, whole.shape, whole.device)
        parts = [torch.stack(products[start]) for start in sorted(products)]
        return torch.stack(parts).double().sum(0).float()

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

    def _delta(self, packed: PackedWeight, weight: torch.Tensor) -> torch.Tensor:
        """dW of the same rows, float32."""
        return multiplied_weight(packed, torch.float32, self._compute).sub_(weight)

    def _packed(self, name: str) -> _Packed:
        """The layer as each candidate stores it."""
        if name in self._kept:
            return self._kept[name]
        layer = self._layers[name]
        weight = layer.weight.detach().to(self._storage)
        found: _Packed = []
        for candidate in self._candidates:
            fits = candidate.format.fits(weight.shape)
            choice = Choice(candidate.format, quantizer=candidate.quantizer)
            stored = stored_weight(name, weight, choice, self._calibration) if fits else None
            found.append(None if stored is None else packed_weight(layer, candidate.format, stored))
        nbytes = sum(tensor.nbytes for packed in found if packed for tensor in packed.tensors.values())
        if nbytes <= self._room:
            self._room -= nbytes
            self._kept[name] = found
        return found

    def _shifts(self, name: str) -> torch.Tensor:
        """db of each candidate, float32, shape (candidates, out); zero where the storage dtype cannot hold b + db."""
        layer = self._layers[name]
        weight = layer.weight.detach().to(self._storage)
        shifts = torch.zeros(len(self._candidates), len(weight), device=weight.device)
        if (mean := self._calibration.input_means.get(name)) is not None:
            for shift, packed in zip(shifts, self._packed(name), strict=True):
                if packed is not None:
                    shift += self._applied(layer, mean_error(layer, weight, packed, mean))
        return shifts

    def _applied(self, layer: Quantizable, shift: torch.Tensor) -> torch.Tensor:
        """`shift`, or zeros if the storage dtype cannot hold the corrected bias."""
        held = layer.bias is None or corrected_bias(layer.bias.detach(), shift, self._storage) is not None
        return shift if held else torch.zeros_like(shift)
