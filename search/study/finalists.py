"""The final choice between the study's finalists and the exact solution, on seeds that the study never saw."""

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
        error: mean of the objective of each finalist on the fresh seeds, in the order given, which is the study's
            ranking.
        won: index of `choices` among the finalists.
    """

    choices: Mapping[str, Choice]
    error: tuple[float, ...]
    won: int = 0

    @property
    def held(self) -> bool:
        """Whether the study's best policy is also the best on fresh seeds."""
        return self.won == 0

    @property
    def leader_rank(self) -> int:
        """Rank of the study's best policy on fresh seeds, from 1."""
        return 1 + sum(error < self.error[0] for error in self.error)


def confirm(
    finalists: Iterable[Mapping[str, Choice]], generations: Generations, samples: Sequence[Sample]
) -> Confirmed:
    """Score every finalist on `samples` and keep the best, or the earlier of two equals.

    Args:
        finalists: the study's best first.
        generations: generates and scores their images.
        samples: ones that the study did not use.
    """
    listed = list(finalists)
    scores = [
        sum(score.distance for score in generations.scores(choices, samples)) / len(samples) for choices in listed
    ]
    won = min(range(len(listed)), key=lambda i: scores[i])
    return Confirmed(listed[won], tuple(scores), won)
