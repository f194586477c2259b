"""What quantizing does to a layer's parameters: dW = Q(W) - W and the db that corrects its mean, per format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bitpolicy.kernels.bias_correction import bias_shift
from bitpolicy.kernels.format import Format
from bitpolicy.kernels.layers import Quantizable
from bitpolicy.policies.calibration import Calibration

_CACHE_BYTES = 2**30  # changes are kept when all of them together fit in this; computed anew for each use if not


class WeightChanges:
    """dW and db of every layer in every format, as rows of a matrix; kept where they fit in memory.

    Args:
        calibration: E[x] per layer, for db.
        storage: dtype of the stored weights; changes are taken against the weight in this dtype.
    """

    def __init__(
        self,
        layers: Mapping[str, Quantizable],
        formats: Sequence[Format],
        calibration: Calibration,
        storage: torch.dtype,
    ) -> None:
        self._layers, self._formats, self._calibration, self._storage = layers, formats, calibration, storage
        total = sum(layer.weight.numel() for layer in layers.values()) * len(formats) * 4
        self._cache: dict[str, dict[str, torch.Tensor]] | None = {} if total <= _CACHE_BYTES else None
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})  # a layer's bias follows its weight, or the reverse

    def of(self, name: str, part: str) -> torch.Tensor:
        """float32, shape (formats, values of the weight or the bias).

        Args:
            part: "weight" or "bias".
        """
        if self._cache is not None:
            if name not in self._cache:
                self._cache[name] = self._compute(name)
            return self._cache[name][part]
        if self._last[0] != name:
            self._last = ("", {})
            self._last = (name, self._compute(name))
        return self._last[1][part]

    def _compute(self, name: str) -> dict[str, torch.Tensor]:
        layer = self._layers[name]
        weight = layer.weight.detach().to(self._storage)
        deltas = [f.dequantize(f.quantize(weight), weight.shape, torch.float32) - weight.float() for f in self._formats]
        changes = {"weight": torch.stack([delta.flatten() for delta in deltas])}
        if layer.bias is not None:  # no mean input, no correction: some models use a layer's weight without calling it
            patch = self._calibration.get(name, torch.zeros(weight.shape[1:]))
            changes["bias"] = torch.stack([bias_shift(layer, delta, patch) for delta in deltas])
        return changes
