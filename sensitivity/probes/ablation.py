"""The ablation probe: quantize one layer, run the real trajectories, measure the error.

It is the ground truth for the other probes, and replaces them where first order fails. It costs one trajectory per
sample for each layer, format and bias. `bitpolicy.sensitivity.probes.measurement` does the measuring.
"""

from __future__ import annotations

import itertools

import torch

from bitpolicy.kernels.quantizers.named import RTN
from bitpolicy.policies.policy import Choice
from bitpolicy.sensitivity.probes.probe import Probe
from bitpolicy.sensitivity.table import SensitivityTable


class AblationProbe(Probe):
    """Measures every layer in every format, with and without bias correction."""

    name = "ablation"
    chooses_quantizer = False
    outside_loop = True
    takes_gradients = False

    def table(self) -> SensitivityTable:
        """The measured errors, each with the better bias."""
        inputs = self._inputs
        shape = (len(inputs.names), len(inputs.formats))
        plain, fixed = (self._empty(torch.full(shape, corrected)) for corrected in (False, True))
        places = [
            (i, j)
            for i, j in itertools.product(range(shape[0]), range(shape[1]))
            if inputs.formats[j].fits(inputs.inventory[i].shape)
        ]
        both = [
            layer.has_bias and layer.name in inputs.quantization.calibration.input_means for layer in inputs.inventory
        ]
        work = {
            alone_name(table, *place): {inputs.names[place[0]]: choice_at(table, *place)}
            for place in places
            for table in ((plain, fixed) if both[place[0]] else (plain,))
        }
        measured = inputs.ablations.measure(work, "ablation probe", quantization=inputs.quantization)
        found = dict(zip(work, measured, strict=True))
        power = torch.zeros(2, *shape, dtype=torch.float64)
        for place in places:
            before = found[alone_name(plain, *place)]
            after = found.get(alone_name(fixed, *place), before)
            power[:, *place] = torch.stack([before.power.mean(), after.power.mean()]) / inputs.reference.latent_power
        least, corrected = power.amin(0), power[1] <= power[0]
        return SensitivityTable(self.name, inputs.names, inputs.formats, least, corrected, quantizers=inputs.quantizers)

    def _empty(self, corrected: torch.Tensor) -> SensitivityTable:
        """A table without errors, which holds the choices with or without bias correction."""
        inputs, zeros = self._inputs, torch.zeros(corrected.shape)
        return SensitivityTable(self.name, inputs.names, inputs.formats, zeros, corrected, quantizers=inputs.quantizers)

    def forwards(self) -> int:
        inputs = self._inputs
        biases = sum(1 + layer.has_bias for layer in inputs.inventory)
        return inputs.trajectory_forwards * biases * len(inputs.formats)


def choice_at(table: SensitivityTable, layer: int, column: int) -> Choice:
    """The choice for a layer in the format of `column`."""
    return table.choice(layer, table.formats[column])


def alone_name(table: SensitivityTable, layer: int, column: int) -> str:
    """The name of the record of one quantized layer."""
    choice = choice_at(table, layer, column)
    bias = "corrected" if choice.bias_correction else "plain"
    rounded = "" if choice.quantizer == RTN else f"-{choice.quantizer}"
    return f"ablation-{table.layers[layer]}-{choice.format.name}-{bias}{rounded}"
