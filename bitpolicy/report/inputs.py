"""What a report is made from: the files that `bitpolicy probe` or a search left in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bitpolicy.check import Check
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16
from bitpolicy.output_folder import for_a_probe, holds_a_search
from bitpolicy.pipelines.loading import BUNDLED
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.policy import Policy
from bitpolicy.sensitivity.inventory import AUTOENCODER, OUTSIDE, Layer
from bitpolicy.sensitivity.probes.error_split import ErrorSplit
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.table_files import ModelContext, read_table

TABLE, SPLIT, CHECK, POLICY = "sensitivity.safetensors", "split.safetensors", "check.json", "policy.yaml"


@dataclass(frozen=True)
class Probed:
    """One probe's results.

    Attributes:
        table: of L layers, F formats and T steps; one more row, `lead`, where something outside the loop is studied.
        model: what is known of the denoiser, or of the components that were studied.
        split: what the errors are made of; None where the probe ran without --split.
        check: the probe against the truth; None where it ran without --check.
        policy: what a search chose; None in a probe's folder.
    """

    table: SensitivityTable
    model: ModelContext
    split: ErrorSplit | None = None
    check: Check | None = None
    policy: Policy | None = None

    @classmethod
    def load(cls, folder: Path) -> Probed:
        """Read what `folder` holds.

        Raises:
            BitPolicyError: it holds no sensitivity table, or files of different probes.
        """
        path = folder / TABLE
        if not path.is_file():
            remedy = f"`{probe_command('--split --check', folder)}` makes it"
            raise BitPolicyError(f"{folder} holds no {TABLE}; {remedy}")
        table = read_table(path)
        found = cls(
            table,
            ModelContext.load(path),
            ErrorSplit.load(folder / SPLIT) if (folder / SPLIT).exists() else None,
            Check.load(folder / CHECK) if (folder / CHECK).exists() else None,
            Policy.load(folder / POLICY) if (folder / POLICY).is_file() else None,
        )
        found._require_one_probe(folder)
        return found

    def _require_one_probe(self, folder: Path) -> None:
        sizes = (len(self.table.layers), len(self.table.formats))
        if self.split is not None and tuple(self.split.error.shape[2:]) != sizes:
            _refuse(folder / SPLIT, "--split")
        names = tuple(f.name for f in self.table.formats)
        if self.check is not None and (self.check.layers, self.check.formats) != (self.table.layers, names):
            _refuse(folder / CHECK, "--check")

    def command(self, options: str, folder: Path) -> str:
        """The `bitpolicy probe` with `options` that makes what is not here."""
        return probe_command(options, folder, BUNDLED if self.policy is None else self.policy.model.id)

    @property
    def layers(self) -> Sequence[Layer]:
        return self.model.inventory

    @property
    def formats(self) -> tuple[Format, ...]:
        """The packed ones, smallest first."""
        return tuple(sorted(self.table.formats, key=lambda f: self.nbytes(f)))

    @property
    def account(self) -> ByteAccount:
        return self.model.account

    @property
    def unet(self) -> bool:
        """Whether the denoiser has an encoder and a decoder, and so skips between them."""
        return {"encoder", "decoder"} <= {layer.stage for layer in self.layers}

    @property
    def lead(self) -> int:
        """Rows that tables by step have before the first step: 1 for what is outside the loop, if any of it is here."""
        return int(any(layer.stage in OUTSIDE for layer in self.layers))

    @property
    def draws(self) -> bool:
        """Whether errors are errors of the image, as they are where an autoencoder is studied."""
        return any(layer.stage == AUTOENCODER for layer in self.layers)

    @property
    def in_loop(self) -> list[int]:
        """Places of the layers that the sampling loop calls."""
        return [place for place, layer in enumerate(self.layers) if layer.stage not in OUTSIDE]

    @property
    def denoiser(self) -> str:
        """Its name, or what its stages say."""
        return self.model.name or ("U-Net" if self.unet else "transformer")

    @property
    def measure(self) -> str:
        """What the table's errors are errors of."""
        signal = "image" if self.draws else "final latent"
        return {"stepwise": "denoiser's output", "weight": "weight"}.get(self.table.probe, signal)

    def nbytes(self, format: Format) -> int:
        """What is studied, with every layer in `format`."""
        return self.account.total(dict.fromkeys(self.account.shapes, format))

    def column(self, format: Format) -> int:
        """Its place in the table."""
        return self.table.formats.index(format)

    def layer_bytes(self, place: int, format: Format = FP16) -> int:
        """Of the layer at `place`."""
        return self.account.layer(self.layers[place].name, format)

    def better_bias(self, values: torch.Tensor) -> torch.Tensor:
        """Of values with the bias as it was and corrected, shape (2, ..., L, F), those the table's errors belong to."""
        return torch.where(self.table.corrected, values[1], values[0])


def probe_command(options: str, folder: Path, model: str = BUNDLED) -> str:
    """The command that makes what `folder` lacks, in a folder of its own where a search lies in this one: a probe
    replaces the sensitivity table."""
    of = "" if model == BUNDLED else f"--model {model} "
    where = for_a_probe(folder) if holds_a_search(folder) else folder
    return f"bitpolicy probe {options} {of}--output-dir {where}"


def _refuse(path: Path, option: str) -> None:
    raise BitPolicyError(f"{path} is of another probe than {TABLE} beside it; run `bitpolicy probe {option}` again")
