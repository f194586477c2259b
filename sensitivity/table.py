"""The sensitivity table: what each (layer, format) does to the final latent.

`sensitivity.safetensors` holds the numbers, `sensitivity.csv` the same for people and spreadsheets.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.format import Format
from bitpolicy.kernels.formats import format_named
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.atomic import write_text, written_aside
from bitpolicy.policies.policy import Choice
from bitpolicy.sensitivity.adjoint import Sketch
from bitpolicy.sensitivity.inventory import Layer


@dataclass(frozen=True)
class SensitivityTable:
    """Scores of every layer in every packed format. FP16 is the reference and scores zero.

    Attributes:
        probe: "adjoint", "ablation" or "weight".
        layers: names, length L.
        formats: the packed formats, length F.
        error: E|dx_0|^2 / E|x_0|^2 of one layer alone with its better bias, float64, shape (L, F), >= 0. For the weight
            probe the relative weight error instead, which is no error of the image.
        corrected: whether bias correction is what gave `error`, bool, shape (L, F).
        sketches: s with that bias, divided by sqrt(E|x_0|^2), float32, shape (R, L, F), so that the mean of squares
            over R is `error`; None where the probe has none.
        by_step: share of each scheduler step in the sketches' power, float32, shape (T, L, F); None like sketches.
    """

    probe: str
    layers: tuple[str, ...]
    formats: tuple[Format, ...]
    error: torch.Tensor
    corrected: torch.Tensor
    sketches: torch.Tensor | None = None
    by_step: torch.Tensor | None = None

    @classmethod
    def from_sketches(
        cls, layers: Sequence[str], formats: Sequence[Format], sketches: Sequence[Sketch], latent_power: float
    ) -> SensitivityTable:
        """Reduce sketches of the adjoint probe; `latent_power` is E|x_0|^2."""
        plain = torch.stack([s.weight for s in sketches]) / latent_power**0.5
        fixed = plain + torch.stack([s.bias for s in sketches]) / latent_power**0.5
        power = [part.sum(1).double().square().mean(0) for part in (plain, fixed)]
        corrected = power[1] <= power[0]  # equal where there is no bias: nothing to do either way
        by_step = torch.where(corrected, fixed, plain)
        steps = by_step.square().mean(0)
        return cls(
            "adjoint",
            tuple(layers),
            tuple(formats),
            torch.where(corrected, power[1], power[0]),
            corrected,
            by_step.sum(1),
            steps / steps.sum(0).clamp(min=torch.finfo(torch.float32).tiny),
        )

    def choice(self, layer: int, format: Format) -> Choice:
        """The format together with the bias that scored better with it."""
        if not format.packed:
            return Choice(format)
        return Choice(format, bool(self.corrected[layer, self.formats.index(format)]))

    def score(self, layer: int, format: Format) -> float:
        """The error of one layer in `format`; zero for FP16."""
        return float(self.error[layer, self.formats.index(format)]) if format.packed else 0.0

    def predicted_error(self, formats: Sequence[Format]) -> float | None:
        """E|dx_0|^2 / E|x_0|^2 of a whole policy, given one format a layer in order.

        None where scores are no image error. From sketches the layers' errors add up as vectors,
        mean_r (sum_l s_r(l, f_l))^2; without them, as powers.
        """
        if self.probe == "weight":
            return None
        if self.sketches is None:
            return sum(self.score(i, format) for i, format in enumerate(formats))
        total = torch.zeros(len(self.sketches), dtype=torch.float64)
        for i, format in enumerate(formats):
            if format.packed:
                total += self.sketches[:, i, self.formats.index(format)].double()
        return float(total.square().mean())

    def save(self, folder: Path, inventory: Sequence[Layer], account: ByteAccount) -> None:
        """Write both files into `folder`."""
        tensors = {"error": self.error, "corrected": self.corrected, "sketches": self.sketches, "by_step": self.by_step}
        about = {"probe": self.probe, "layers": self.layers, "formats": [f.name for f in self.formats]}
        with written_aside(folder / "sensitivity.safetensors") as aside:
            kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
            save_file(kept, aside, metadata={"bitpolicy": json.dumps(about)})
        write_text(folder / "sensitivity.csv", self._csv(inventory, account))

    @classmethod
    def load(cls, path: Path) -> SensitivityTable:
        """Read `sensitivity.safetensors`.

        Raises:
            BitPolicyError: it is missing or no such table.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["bitpolicy"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise BitPolicyError(
                f"cannot read sensitivity table {path}: {error}; run `bitpolicy probe` again"
            ) from error
        formats = tuple(format_named(name) for name in about["formats"])
        return cls(about["probe"], tuple(about["layers"]), formats, **tensors)

    def _csv(self, inventory: Sequence[Layer], account: ByteAccount) -> str:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(
            ["layer", "role", "stage", "kind", "shape", "format", "bytes", "error", "bias_corrected", "probe"]
        )
        for i, layer in enumerate(inventory):
            for j, format in enumerate(self.formats):
                shape = "x".join(map(str, layer.shape))
                row: list[object] = [layer.name, layer.role, layer.stage, layer.kind, shape, format.name]
                row += [
                    account.layer(layer.name, format),
                    f"{float(self.error[i, j]):.6e}",
                    bool(self.corrected[i, j]),
                    self.probe,
                ]
                rows.writerow(row)
        return text.getvalue()
