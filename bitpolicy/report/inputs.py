"""The input of a report: the files that `bitpolicy probe` or a search left in a folder."""

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
        table: of L layers and F formats.
        model: description of the denoiser, or of the studied components.
        split: what the errors consist of, step by step; None if the probe ran without --split.
        check: the probe compared with measurements; None if it ran without --check.
        policy: what a search chose; None in a probe's folder.
    """

    table: SensitivityTable
    model: ModelContext
    split: ErrorSplit | None = None
    check: Check | None = None
    policy: Policy | None = None

    @classmethod
    def load(cls, folder: Path) -> Probed:
        """Read the files in `folder`.

        Raises:
            BitPolicyError: it holds no sensitivity table, or files of different probes.
        """
        path = folder / TABLE
        if not path.is_file():
            remedy = f"`{probe_command('--split --check', folder)}` creates it"
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
        """The `bitpolicy probe` command with `options` that creates what is missing here."""
        return probe_command(options, folder, BUNDLED if self.policy is None else self.policy.model.id)

    @property
    def layers(self) -> Sequence[Layer]:
        return self.model.inventory

    @property
    def formats(self) -> tuple[Format, ...]:
        """The packed formats, smallest first."""
        return tuple(sorted(self.table.formats, key=lambda f: self.nbytes(f)))

    @property
    def account(self) -> ByteAccount:
        return self.model.account

    @property
    def unet(self) -> bool:
        """Whether the denoiser has an encoder and a decoder, and therefore skips between them."""
        return {"encoder", "decoder"} <= {layer.stage for layer in self.layers}

    @property
    def lead(self) -> int:
        """Rows before the first step in tables by step: 1 if something outside the loop is studied, otherwise 0."""
        return int(any(layer.stage in OUTSIDE for layer in self.layers))

    @property
    def draws(self) -> bool:
        """Whether errors are errors of the image, which is so if an autoencoder is studied."""
        return any(layer.stage == AUTOENCODER for layer in self.layers)

    @property
    def in_loop(self) -> list[int]:
        """Indices of the layers that the sampling loop calls."""
        return [place for place, layer in enumerate(self.layers) if layer.stage not in OUTSIDE]

    @property
    def denoiser(self) -> str:
        """The denoiser's name; without one, the kind that its stages show."""
        return self.model.name or ("U-Net" if self.unet else "transformer")

    @property
    def measure(self) -> str:
        """What the table's errors are errors of."""
        signal = "image" if self.draws else "final latent"
        return {"stepwise": "denoiser's output", "weight": "weight"}.get(self.table.probe, signal)

    def nbytes(self, format: Format) -> int:
        """Bytes of the studied components with every layer in `format`."""
        return self.account.total(dict.fromkeys(self.account.shapes, format))

    def column(self, format: Format) -> int:
        """The format's index in the table."""
        return self.table.formats.index(format)

    def layer_bytes(self, place: int, format: Format = FP16) -> int:
        """Bytes of the layer at `place`."""
        return self.account.layer(self.layers[place].name, format)

    def better_bias(self, values: torch.Tensor) -> torch.Tensor:
        """The values that belong to the table's errors, from values with the bias uncorrected and corrected, shape (2,
        ..., L, F)."""
        return torch.where(self.table.corrected, values[1], values[0])


def probe_command(options: str, folder: Path, model: str = BUNDLED) -> str:
    """The command that creates what `folder` lacks. If a search is in the folder, it writes to another one, because a
    probe replaces the sensitivity table."""
    of = "" if model == BUNDLED else f"--model {model} "
    where = for_a_probe(folder) if holds_a_search(folder) else folder
    return f"bitpolicy probe {options} {of}--output-dir {where}"


def _refuse(path: Path, option: str) -> None:
    raise BitPolicyError(
        f"{path} is from another probe than {TABLE} in this folder; run `bitpolicy probe {option}` again"
    )
