"""The sensitivity table: what quantizing each layer to each format does to the final latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.names import DEFAULT_QUANTIZER
from bitpolicy.kernels.quantizers.named import RTN
from bitpolicy.policies.policy import Choice
from bitpolicy.sensitivity.cost.forwards import Cost
from bitpolicy.sensitivity.rounding.candidates import Candidate
from bitpolicy.sensitivity.rounding.quantizer_choice import chosen
from bitpolicy.sensitivity.sketches.sketch import Sketch

NO_IMAGE_ERROR = ("stepwise", "weight", "prior")  # probes whose numbers rank layers but are not errors of the image
FIRST_ORDER = 1e-3  # relative error of the final latent up to which a first-order prediction is trusted


@dataclass(frozen=True)
class SensitivityTable:
    """Scores of every layer in every packed format. FP16 is the reference and scores zero.

    Attributes:
        probe: "adjoint", "stepwise", "ablation", "weight" or "prior".
        layers: names, length L.
        formats: the packed formats, length F.
        error: E|dx_0|^2 / E|x_0|^2 when only this layer is quantized, with the better bias, float64, shape (L, F),
            >= 0. The stepwise probe gives the relative error of the denoiser's outputs, the weight probe that of the
            weight; neither is an error of the image.
        corrected: whether bias correction gave `error`, bool, shape (L, F).
        sketches: s with that bias, divided by sqrt(E|x_0|^2), float32, shape (R, L, F), so that the mean of squares
            over R is `error`; None if the probe has no sketches.
        measured: where `error` was re-measured by ablation, bool, shape (L, F); None if it was not.
        cost: the cost of the probe; None if it was not counted.
        quantizers: the rounding methods tried. Without `quantizer`, the first one applies everywhere.
        quantizer: index of the method that gave `error`, uint8, shape (L, F); None if only one was tried.
        inputs: the error from rounding the layer's inputs alone, to first order, in the units of `error`, float64,
            shape (L, F); None if no inputs are rounded, or if the probe does not measure it.
        compute: the activation quantization of packed layers.
    """

    probe: str
    layers: tuple[str, ...]
    formats: tuple[Format, ...]
    error: torch.Tensor
    corrected: torch.Tensor
    sketches: torch.Tensor | None = None
    measured: torch.Tensor | None = None
    cost: Cost | None = None
    quantizers: tuple[str, ...] = (RTN,)
    quantizer: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    compute: Compute = Compute.EXACT

    @classmethod
    def from_sketches(
        cls,
        layers: Sequence[str],
        candidates: Sequence[Candidate],
        sketches: Sequence[Sketch],
        latent_power: float,
        probe: str = "adjoint",
    ) -> SensitivityTable:
        """Reduce sketches of the adjoint or the stepwise probe.

        Each candidate gets the bias that scores better. `quantizer_choice` picks the rounding method for each layer and
        format: the default (or the first, if the default was not tried), unless another is better beyond doubt.

        Args:
            candidates: ordered format by format.
            latent_power: E|x_0|^2; for the stepwise probe, the power of the denoiser's outputs.
        """
        plain = torch.stack([s.plain for s in sketches]) / latent_power**0.5
        fixed = torch.stack([s.corrected for s in sketches]) / latent_power**0.5
        squares = [part.sum(1).double().square() for part in (plain, fixed)]
        corrected = squares[1].mean(0) <= squares[0].mean(0)  # both are equal if the layer has no bias
        of_candidate = torch.where(corrected, squares[1], squares[0])
        formats = list(dict.fromkeys(candidate.format for candidate in candidates))
        quantizers = list(dict.fromkeys(candidate.quantizer for candidate in candidates))
        usual = quantizers.index(DEFAULT_QUANTIZER) if DEFAULT_QUANTIZER in quantizers else 0
        best = chosen(of_candidate.unflatten(2, (len(formats), len(quantizers))), usual)
        column = best + torch.arange(len(formats)) * len(quantizers)
        whole = torch.where(corrected, fixed.sum(1), plain.sum(1)).gather(2, column.expand(len(plain), *column.shape))
        return cls(
            probe,
            tuple(layers),
            tuple(formats),
            of_candidate.mean(0).gather(1, column),
            corrected.gather(1, column),
            whole,
            quantizers=tuple(quantizers),
            quantizer=best.to(torch.uint8) if len(quantizers) > 1 else None,
            inputs=_of_inputs(sketches, column, latent_power),
        )

    def remeasured(self, errors: Mapping[tuple[int, int], float]) -> SensitivityTable:
        """The table with the errors at some places (layer, column of the format) replaced by measured ones.

        Sketches are rescaled to match the measured errors.
        """
        if not errors:
            return self
        error = self.error.clone()
        measured = torch.zeros_like(self.corrected) if self.measured is None else self.measured.clone()
        for place, value in errors.items():
            error[place], measured[place] = value, True
        return replace(self.rescaled(error), measured=measured)

    def rescaled(self, error: torch.Tensor) -> SensitivityTable:
        """The table with other errors, float64, shape (L, F), and its sketches rescaled to match them."""
        scale = (error / self.error.clamp(min=torch.finfo(torch.float64).tiny)).float()
        sketches = None if self.sketches is None else self.sketches * scale.sqrt()
        return replace(self, error=error, sketches=sketches)

    def largest(self, count: int) -> list[tuple[int, int]]:
        """Up to `count` places (layer, column of the format) with errors too large for first order, worst first."""
        order = self.error.flatten().argsort(descending=True)[:count].tolist()
        places = [divmod(place, len(self.formats)) for place in order]
        return [place for place in places if self.error[place] > FIRST_ORDER]

    def halves(self) -> tuple[SensitivityTable, SensitivityTable] | None:
        """Two tables, from the first and the second half of the sketches; None with fewer than two sketches."""
        if self.sketches is None or len(self.sketches) < 2:
            return None
        parts = self.sketches[: len(self.sketches) // 2], self.sketches[len(self.sketches) // 2 :]
        first, second = (replace(self, sketches=s, error=s.double().square().mean(0)) for s in parts)
        return first, second

    def inputs_share(self, layer: int, column: int) -> float | None:
        """The share of an error that rounding the layer's inputs makes alone, at most 1; None if unknown.

        The rest is not exactly the weight's share, because the two errors may add up or cancel.
        """
        if self.inputs is None:
            return None
        whole = float(self.error[layer, column])
        return min(float(self.inputs[layer, column]) / whole, 1.0) if whole > 0 else 0.0

    def source(self, layer: int, column: int) -> str:
        """The probe that a number came from."""
        return "ablation" if self.measured is not None and bool(self.measured[layer, column]) else self.probe

    def choice(self, layer: int, format: Format) -> Choice:
        """The format, with the rounding method and the bias that scored better with it."""
        if not format.packed:
            return Choice(format)
        column = self.formats.index(format)
        index = 0 if self.quantizer is None else int(self.quantizer[layer, column])
        return Choice(format, bool(self.corrected[layer, column]), self.quantizers[index])

    def score(self, layer: int, format: Format) -> float:
        """The error of one layer in `format`; zero for FP16."""
        return float(self.error[layer, self.formats.index(format)]) if format.packed else 0.0

    def additive_error(self, formats: Sequence[Format]) -> float | None:
        """E|dx_0|^2 / E|x_0|^2 of a whole policy, if the powers of its layers' errors add up.

        With fewer sketches than layers, this predicts better than `vector_error` (docs/decisions/probe.md).

        Args:
            formats: one per layer, in order.

        Returns:
            None if scores are not errors of the image.
        """
        if self.probe in NO_IMAGE_ERROR:
            return None
        return sum(self.score(i, format) for i, format in enumerate(formats))

    def vector_error(self, formats: Sequence[Format]) -> float | None:
        """The same with the layers' errors added as vectors: mean_r (sum_l s_r(l, f_l))^2, which is never negative.

        Returns:
            None if there are no sketches of the image's error.
        """
        if self.probe in NO_IMAGE_ERROR or self.sketches is None:
            return None
        total = torch.zeros(len(self.sketches), dtype=torch.float64)
        for i, format in enumerate(formats):
            if format.packed:
                total += self.sketches[:, i, self.formats.index(format)].double()
        return float(total.square().mean())


def _of_inputs(sketches: Sequence[Sketch], column: torch.Tensor, latent_power: float) -> torch.Tensor | None:
    """The mean square of the sketches' part from inputs, divided by `latent_power`, for the candidates in `column`."""
    found = [s.inputs for s in sketches if s.inputs is not None]
    if not found:
        return None
    return torch.stack(found).sum(1).double().square().mean(0).gather(1, column) / latent_power
