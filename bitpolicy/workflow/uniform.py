"""One format in every layer: what the bytes of a policy would give without a search.

It is the best such assignment in at most the policy's bytes, by the scores that the search used, or the smallest one if
none fits. Its layers have the rounding methods and bias corrections that scored best for that format, as the policy's
have for theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.search.generation import Generations
from bitpolicy.search.knapsack import Solution
from bitpolicy.search.problem import Problem
from bitpolicy.search.quality.psnr import Psnr
from bitpolicy.search.quality.sound import sampling_rate
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.workflow.compare import PICTURES, Row
from bitpolicy.workflow.plan import Plan


@dataclass(frozen=True)
class Uniform:
    """One format wherever the layers may have it. The other layers are as in the policy that it is compared with.

    Attributes:
        format: the format.
        choices: layer name -> choice.
        nbytes: tensor bytes of the checkpoint.
        layers: how many layers have the format.
        larger: whether it takes more bytes than the policy.
    """

    format: Format
    choices: Mapping[str, Choice]
    nbytes: int
    layers: int
    larger: bool

    @property
    def name(self) -> str:
        """ "INT4 everywhere", or "INT4 in 60 of 65 layers" if some layers cannot have the format."""
        whole = len(self.choices)
        where = "everywhere" if self.layers == whole else f"in {self.layers} of {whole} layers"
        return f"{self.format.name.upper()} {where}"

    def as_dict(self) -> dict[str, Any]:
        """The assignment as JSON."""
        return {
            "name": self.name,
            "format": self.format.name,
            "layers": self.layers,
            "policy_bytes": self.nbytes,
            "larger": self.larger,
        }


def drawn_uniform(
    plan: Plan,
    problem: Problem,
    generations: Generations,
    policy: Policy,
    own: Row,
    reference: Sequence[torch.Tensor],
    stages: Stages,
) -> tuple[Row, dict[str, Any]] | None:
    """The row of compare.png that shows one format everywhere, and its record as JSON. Only the images of that row are
    drawn.

    Args:
        own: the row of the policy.
        reference: images of the held-out samples, as in a `Row`.

    Returns:
        None if there is no such format, or if its images overflow.
    """
    formats = [format for format in plan.formats if format.name in plan.asked]
    choices = policy.resolve(layer.name for layer in plan.layers)
    uniform = best_uniform(problem, formats, plan.account, choices)
    if uniform is None:
        return None
    shown = stages.track(plan.split.held_out[:PICTURES], "held-out, one format")
    try:
        images = generations.images(uniform.choices, shown)
    except BitPolicyError as error:
        stages.warn(f"compare.png has no row for {uniform.name}: {error}")
        return None
    row = Row.of(uniform.name, uniform.nbytes, images, reference, sampling_rate(plan.source.pipe))
    if uniform.larger:
        row = replace(row, label=(*row.label, "larger: none fits"))
    return row, {**uniform.as_dict(), **_measured("", row, reference), **_measured("policy_", own, reference)}


def _measured(owner: str, row: Row, reference: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The PSNR of a row's results, and the mel distance of sounds."""
    found = {f"{owner}psnr_db": Psnr.of(reference[: len(row.results)], row.results).as_dict()}
    if row.closeness is not None and row.closeness.name == "mel":
        found[f"{owner}mel_db"] = row.closeness.as_dict()
    return found


def best_uniform(
    problem: Problem, formats: Collection[Format], account: ByteAccount, choices: Mapping[str, Choice]
) -> Uniform | None:
    """The best assignment of one packed format that takes at most the bytes of a policy; otherwise the smallest one.

    Args:
        problem: the search problem that the policy solves.
        formats: the candidates; those that are not packed are ignored.
        account: byte account of the checkpoint.
        choices: the policy, layer name -> choice.

    Returns:
        None if no layer may have any of the formats.
    """
    most = _nbytes(account, choices)
    own = np.array([problem.formats.index(choices[layer.name].format) for layer in problem.inventory])
    error, found = problem.errors(), list[tuple[float, Uniform]]()
    for format in (f for f in formats if f.packed):
        assigned = _everywhere(problem, problem.formats.index(format), own)
        if assigned is None:
            continue
        total = float(error[np.arange(len(assigned)), assigned].sum())
        chosen = problem.choices(Solution(assigned, total, 0, 0.0))
        nbytes, layers = _nbytes(account, chosen), sum(choice.format == format for choice in chosen.values())
        found.append((total, Uniform(format, chosen, nbytes, layers, nbytes > most)))
    fitting = [(total, uniform.nbytes, uniform) for total, uniform in found if not uniform.larger]
    if fitting:
        return min(fitting, key=lambda entry: entry[:2])[2]
    return min((uniform for _, uniform in found), key=lambda uniform: uniform.nbytes, default=None)


def _everywhere(problem: Problem, column: int, own: np.ndarray) -> np.ndarray | None:
    """The format in `column` wherever all layers of a row may have it, and the policy's own format elsewhere; int64,
    shape (layers). None if no row may have it."""
    allowed, assigned = problem.allowed()[:, column], own.copy()
    rows = [row for row in problem.rows() if allowed[row].all()]
    for row in rows:
        assigned[row] = column
    return assigned if rows else None


def _nbytes(account: ByteAccount, choices: Mapping[str, Choice]) -> int:
    return account.total({name: choice.format for name, choice in choices.items()})
