"""Compare the probe's predictions with measurements, layer by layer and over random policies.

`bitpolicy.sensitivity.probes.measurement` provides the measurements: quantize, run the real trajectory, and take the
distance of the final latent from the reference's, on the samples that the probe used. Layers are compared by Spearman's
rank correlation and by the median ratio of predicted to measured error. Policies are compared in the same way, over the
whole range of sizes. A policy's prediction adds the layers' sketches as vectors. With fewer sketches than layers, the
off-diagonal part of that quadratic form is noisy. The form is therefore also judged on held-out samples: computed from
one half of the samples, and compared with the measured error of the other half.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.storage.atomic import write_text
from bitpolicy.policies.storage.sealed import read_sealed, sealed
from bitpolicy.sensitivity.probes.ablation import alone_name
from bitpolicy.sensitivity.probes.measurement import Measured
from bitpolicy.sensitivity.probes.run import ProbeRun
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.reference import ReferencePass

TRUSTED_DB = 20.0  # PSNR below which the images no longer show the same picture
LAYERS, POLICIES = "check: layers", "check: random policies"  # names of the progress bars


@dataclass(frozen=True)
class Agreement:
    """How well predictions and measurements agree.

    Attributes:
        what: a format's name, or "policies".
        n: number of pairs.
        spearman: rank correlation; None if it is undefined because all values are equal.
        median_ratio: median ratio of predicted to measured.
        within_2x: share of pairs with a ratio between 1/2 and 2.
    """

    what: str
    n: int
    spearman: float | None
    median_ratio: float
    within_2x: float

    @classmethod
    def of(cls, what: str, predicted: Sequence[float], measured: Sequence[float]) -> Agreement:
        p, m = np.asarray(predicted, float), np.asarray(measured, float)
        ratio = p / np.maximum(m, np.finfo(float).tiny)
        defined = len(set(p)) > 1 and len(set(m)) > 1
        rank = float(spearmanr(p, m).statistic) if defined else None
        return cls(what, len(p), rank, float(np.median(ratio)), float(np.mean((ratio >= 0.5) & (ratio <= 2))))


@dataclass(frozen=True)
class CheckedPolicy:
    """One random policy.

    Attributes:
        nbytes: its size.
        predicted: E|dx_0|^2 / E|x_0|^2 from all sketches, added as vectors.
        additive: the same from the layers' errors, added as powers.
        held_out: like `predicted`, from the sketches of the first half of the samples; None if there are none.
        measured: from real trajectories; `measured_held_out` from those of the second half of the samples.
        psnr_db: PSNR of the decoded images, mean over samples; None if one image is identical.
        bias: the mean error over samples, as a share of the measured error.
    """

    nbytes: int
    predicted: float
    additive: float
    held_out: float | None
    measured: float
    measured_held_out: float
    psnr_db: float | None
    bias: float


@dataclass(frozen=True)
class Check:
    """A probe's predictions and the matching measurements.

    Attributes:
        layers, formats: names, of lengths L and F.
        predicted, measured: E|dx_0|^2 / E|x_0|^2 with only one layer quantized, shape (L, F).
        bias, parallel: shares of the measured error, shape (L, F).
        policies: the random policies; the first one quantizes nothing and must be zero in both.
        forwards: denoiser forwards that the measurements took.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    predicted: list[list[float]]
    measured: list[list[float]]
    bias: list[list[float]]
    parallel: list[list[float]]
    policies: tuple[CheckedPolicy, ...]
    forwards: int

    def agreements(self) -> list[Agreement]:
        """For each format over the layers, then over the policies whose images still show the same picture."""
        p, m = np.asarray(self.predicted), np.asarray(self.measured)
        found = [Agreement.of(name, p[:, j].tolist(), m[:, j].tolist()) for j, name in enumerate(self.formats)]
        trusted = [p for p in self.policies[1:] if p.psnr_db is not None and p.psnr_db > TRUSTED_DB]
        if trusted:
            measured = [p.measured for p in trusted]
            found.append(Agreement.of("policies", [p.predicted for p in trusted], measured))
            found.append(Agreement.of("policies, additive", [p.additive for p in trusted], measured))
            halves = [(p.held_out, p.measured_held_out) for p in trusted if p.held_out is not None]
            if halves:
                found.append(Agreement.of("policies, held out", *zip(*halves, strict=True)))
        return found

    def save(self, path: Path) -> None:
        """Write JSON, including the agreements."""
        content = {**asdict(self), "agreements": [asdict(a) for a in self.agreements()]}
        write_text(path, json.dumps(sealed(content), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Check:
        """Read the JSON.

        Raises:
            BitPolicyError: the file is missing or is not a check.
        """
        try:
            found = read_sealed(path)
            found.pop("agreements")
            policies = tuple(CheckedPolicy(**policy) for policy in found["policies"])
            names: dict[str, Any] = {key: tuple(found[key]) for key in ("layers", "formats")}
            return cls(**{**found, **names, "policies": policies})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BitPolicyError(f"cannot read {path}: {error}; run `bitpolicy probe --check` again") from error


def check(run: ProbeRun, table: SensitivityTable, reference: ReferencePass, account: ByteAccount, count: int) -> Check:
    """Measure every layer in every format, and `count` random policies.

    Args:
        table: the table of an adjoint probe; what ablation re-measured counts as a prediction.
    """
    shape = (len(table.layers), len(table.formats))
    layers = run.measure(
        {
            alone_name(table, i, j): {table.layers[i]: table.choice(i, table.formats[j])}
            for i in range(shape[0])
            for j in range(shape[1])
        },
        reference,
        LAYERS,
    )
    power = reference.latent_power
    measured = torch.stack([m.power.mean() for m in layers]).reshape(shape) / power
    shares = torch.tensor([[m.bias_share, m.parallel_share] for m in layers]).reshape(*shape, 2)
    drawn: list[list[Format]] = [[FP16] * shape[0], *random_policies(shape[0], table.formats, count)]
    choices = {
        f"policy-{i}": {table.layers[j]: table.choice(j, f) for j, f in enumerate(formats)}
        for i, formats in enumerate(drawn)
    }
    found = run.measure(choices, reference, POLICIES, images=True)
    halves = table.halves()
    half = halves[0] if halves else None
    policies = tuple(_checked(table, half, *row, account, power) for row in zip(drawn, found, strict=True))
    forwards = (len(layers) + len(found)) * len(layers[0].power) * reference.calls
    return Check(
        table.layers,
        tuple(f.name for f in table.formats),
        table.error.tolist(),
        measured.tolist(),
        shares[..., 0].tolist(),
        shares[..., 1].tolist(),
        policies,
        forwards,
    )


def random_policies(layers: int, formats: Sequence[Format], count: int) -> Iterator[list[Format]]:
    """`count` random policies, from nearly all FP16 to no FP16; the same ones in every run."""
    for i in range(count):
        draw = random.Random(i)
        packed = draw.random()
        shares = [draw.random() for _ in formats]
        weights = [packed * share / sum(shares) for share in shares]
        yield draw.choices([*formats, FP16], [*weights, 1 - packed], k=layers)


def _checked(
    table: SensitivityTable,
    first_half: SensitivityTable | None,
    formats: Sequence[Format],
    measured: Measured,
    account: ByteAccount,
    power: float,
) -> CheckedPolicy:
    half = len(measured.power) // 2
    vector, additive = table.vector_error(formats), table.additive_error(formats)
    return CheckedPolicy(
        nbytes=account.total(dict(zip(table.layers, formats, strict=True))),
        predicted=vector if vector is not None else additive or 0.0,
        additive=additive or 0.0,
        held_out=first_half.vector_error(formats) if first_half else None,
        measured=float(measured.power.mean()) / power,
        measured_held_out=float(measured.power[half:].mean()) / power,
        psnr_db=measured.psnr_db,
        bias=measured.bias_share,
    )
