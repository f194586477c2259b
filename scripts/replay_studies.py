"""Where finished studies would have stopped, and what the rest of their trials gained.

Reads the journals of searches that ran all their trials, and asks the rule of `bitpolicy.search.study.stopping` after
each trial. Prints one row for each study: trials, seconds and generated images until the verdict and in total; what the
verdict expected of the rest; what the rest did gain over the best trial before it, on the search samples; and what all
trials gained over the exact solution.

    search-policy --budget 5MB --all-trials --output-dir out
    python scripts/replay_studies.py out/study.journal
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from bitpolicy.search.study.journal import journal
from bitpolicy.search.study.stopping import in_turn, verdict

_COLUMNS = ("study", "trials", "seconds", "images", "expected of the rest", "the rest gained", "all gained")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journals", type=Path, nargs="+")
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    for path in parser.parse_args().journals:
        for study in studies(path):
            print(f"| {' | '.join((path.parent.name, *row(study)))} |")


def studies(path: Path) -> Iterator[optuna.Study]:
    """The studies of a journal, which is copied first: opening it may repair it."""
    with tempfile.TemporaryDirectory() as folder:
        storage = journal(shutil.copy(path, folder), alone=True)
        for summary in optuna.get_all_study_summaries(storage):
            yield optuna.load_study(study_name=summary.study_name, storage=storage)


def row(study: optuna.Study) -> tuple[str, ...]:
    trials = in_turn(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    starts, samples, asked = len(study.user_attrs["starts"]), study.user_attrs["samples"], len(trials)
    found = (verdict(trials[:count], starts, samples, asked) for count in range(1, asked))
    stopped = next((one for one in found if one is not None), None)
    count = asked if stopped is None else stopped.trials
    whole, before = best(trials, samples), best(trials[:count], samples)
    exact = trials[0].value
    assert exact is not None
    return (
        f"{count} of {asked}",
        f"{seconds(trials[:count]):.0f} of {seconds(trials):.0f}",
        f"{images(trials[:count])} of {images(trials)}",
        "" if stopped is None else f"at most {stopped.gain_db:.3f} dB",
        f"{10 * math.log10(before / whole):.2f} dB",
        f"{10 * math.log10(exact / whole):.2f} dB",
    )


def best(trials: Sequence[FrozenTrial], samples: int) -> float:
    """The lowest score of a trial that was scored on every sample."""
    return min(t.value for t in trials if t.value is not None and t.user_attrs["samples"] == samples)


def seconds(trials: Sequence[FrozenTrial]) -> float:
    return sum(trial.duration.total_seconds() for trial in trials if trial.duration is not None)


def images(trials: Sequence[FrozenTrial]) -> int:
    return sum(trial.user_attrs["samples"] for trial in trials if "repeats" not in trial.user_attrs)


if __name__ == "__main__":
    main()
