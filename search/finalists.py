"""The last choice: finalists of the study and the exact solution, on seeds that the study never saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bitpolicy.policies.policy import Choice
from bitpolicy.search.generation import Generations
from bitpolicy.sensitivity.samples import Sample


@dataclass(frozen=True)
class Confirmed:
    """The policy that did best on fresh seeds.

    Attributes:
        choices: layer name -> choice.
        error: mean squared image error of each finalist, in the order given.
    """

    choices: Mapping[str, Choice]
    error: tuple[float, ...]


def confirm(
    finalists: Iterable[Mapping[str, Choice]], generations: Generations, samples: Sequence[Sample]
) -> Confirmed:
    """Score every finalist on `samples` and keep the best; the earlier one where two are equal."""
    listed = list(finalists)
    scores = [sum(generations.errors(choices, samples)) / len(samples) for choices in listed]
    won = min(range(len(listed)), key=lambda i: scores[i])
    return Confirmed(listed[won], tuple(scores))
