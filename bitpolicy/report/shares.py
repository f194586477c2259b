"""Whether INT4 is a bias and INT8 a noise: what the errors of a role consist of, and what that says about the claim.

A share is one part summed over layers, divided by the whole error summed over layers. A layer therefore counts as much
as it affects the latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bitpolicy.report.groups import by_role
from bitpolicy.report.inputs import Probed
from bitpolicy.sensitivity.probes.error_split import ErrorSplit

MOSTLY = 0.5  # an error is mostly of one part if that part has more than this share
AS_IT_WAS, CORRECTED = 0, 1  # indices on the first axis of an `ErrorSplit`


@dataclass(frozen=True)
class Shares:
    """What the errors of some layers in one format consist of. The shares add up to one, or are all zero if there is no
    error."""

    bias: float
    scale: float
    noise: float

    def __str__(self) -> str:
        return f"{self.bias:.0%} bias, {self.scale:.0%} scale and {self.noise:.0%} noise"

    @property
    def parts(self) -> tuple[float, float, float]:
        return self.bias, self.scale, self.noise


def shares(split: ErrorSplit, corrected: int, column: int, members: Iterable[int] | None = None) -> Shares:
    """The shares of the layers at `members`, or of all layers; `corrected` selects biases without or with
    correction."""
    places = slice(None) if members is None else list(members)
    whole, bias, scale = (
        float(part[corrected, 0, :, column].double()[places].sum())
        for part in (split.error, split.bias, split.parallel)
    )
    if whole <= 0:
        return Shares(0.0, 0.0, 0.0)
    return Shares(bias / whole, scale / whole, max(0.0, 1 - (bias + scale) / whole))


def shares_by_role(probed: Probed, split: ErrorSplit, corrected: int, column: int) -> dict[str, Shares]:
    """Shares of all layers, under "all layers", and then of each role, largest error first."""
    roles = {group.name: shares(split, corrected, column, group.members) for group in by_role(probed)}
    return {"all layers": shares(split, corrected, column), **roles}


@dataclass(frozen=True)
class Claim:
    """One half of "INT4 is a bias, INT8 a noise", compared with the numbers.

    Attributes:
        what: the claim, e.g. "INT4 is a bias".
        holds: whether that part is more than half of the error of all layers, without bias correction.
        found: what the error consists of.
    """

    what: str
    holds: bool
    found: Shares

    def __str__(self) -> str:
        verdict = "confirmed" if self.holds else "refuted"
        return f"{self.what}: {verdict}. Without bias correction, its error is {self.found}."


def claims(probed: Probed, split: ErrorSplit) -> list[Claim]:
    """The claims that the smallest format is a bias and, if there are at least two formats, that the largest is a
    noise."""
    small, *others = probed.formats
    of_small = shares(split, AS_IT_WAS, probed.column(small))
    found = [Claim(f"{small.name.upper()} is a bias", of_small.bias > MOSTLY, of_small)]
    if others:
        of_large = shares(split, AS_IT_WAS, probed.column(others[-1]))
        found.append(Claim(f"{others[-1].name.upper()} is a noise", of_large.noise > MOSTLY, of_large))
    return found


def roles_sentence(probed: Probed, split: ErrorSplit) -> str:
    """A sentence that names the roles in which the smallest format is a bias."""
    format = probed.formats[0]
    column = probed.column(format)
    roles = by_role(probed)
    biased = [g.name for g in roles if shares(split, AS_IT_WAS, column, g.members).bias > MOSTLY]
    named = f": {', '.join(biased)}" if biased else ""
    return f"Bias is more than half of {format.name.upper()}'s error in {len(biased)} of {len(roles)} roles{named}."


def correction_sentence(probed: Probed, split: ErrorSplit) -> str:
    """A sentence on how much bias correction takes off the summed error, and how much bias is left."""
    return " ".join(_corrected(split, format.name.upper(), probed.column(format)) for format in probed.formats)


def _corrected(split: ErrorSplit, name: str, column: int) -> str:
    before, after = (float(split.error[c, 0, :, column].double().sum()) for c in (AS_IT_WAS, CORRECTED))
    bias = [float(split.bias[c, 0, :, column].double().sum()) for c in (AS_IT_WAS, CORRECTED)]
    if min(before, after) <= 0:
        return ""
    change = 10 * math.log10(before / after)
    what = f"takes {change:.1f} dB off" if change >= 0 else f"adds {-change:.1f} dB to"
    kept = f" and leaves {bias[1] / bias[0]:.0%} of the bias" if bias[0] > 0 else ""
    left = shares(split, CORRECTED, column)
    return f"Bias correction {what} {name}'s summed error{kept}. What is left is {left}."


def layer_medians(split: ErrorSplit, corrected: int, column: int) -> Shares:
    """The median layer's share of each part; the three need not add up to one."""
    whole = split.error[corrected, 0, :, column].double().clamp(min=torch.finfo(torch.float64).tiny)
    parts = (split.bias, split.parallel, split.noise)
    return Shares(*(float((part[corrected, 0, :, column].double() / whole).median()) for part in parts))
