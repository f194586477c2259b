"""Choose a policy from the scores: within a budget, by the exact solver and a study, or as small as a quality
allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.output_folder import EXTENDABLE, identity_of
from bitpolicy.pipelines.loading import BUNDLED_FOLDER, Source
from bitpolicy.policies.policy import Choice
from bitpolicy.search.generation import Generations
from bitpolicy.search.problem import Problem
from bitpolicy.search.quality.metrics import perceptual_distance
from bitpolicy.search.quality.networks import Networks
from bitpolicy.search.quality.psnr import Unavailable
from bitpolicy.search.study.finalists import Confirmed, confirm
from bitpolicy.search.study.journal import journal
from bitpolicy.search.study.starts import repaired
from bitpolicy.search.study.study import Study
from bitpolicy.search.study.trials import FILE as TRIALS
from bitpolicy.search.study.trials import save_trials
from bitpolicy.search.target import MEASUREMENTS, Measured, Reach
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.records import settings_key
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.settings import Settings
from bitpolicy.workflow.plan import Plan

_FINALISTS = 3
_TIGHTER = 3  # attempts; each raises the target because fresh seeds fell short
_SMALLEST_ERROR = 1e-9  # relative to the smallest policy's: the most accurate policy to look for
_IDENTICAL = 1e-20  # squared error of identical images


@dataclass(frozen=True)
class Decision:
    """A policy and how it was chosen.

    Attributes:
        choices: layer name -> choice.
        about: record for the policy file.
    """

    choices: Mapping[str, Choice]
    about: dict[str, Any]


def within_budget(
    settings: Settings, plan: Plan, problem: Problem, generations: Generations, folder: Path, stages: Stages
) -> Decision:
    """The exact solution, or a policy that a study found and that holds on fresh seeds."""
    exact = problem.solve()
    gap = float(f"{exact.gap:.2g}")
    if settings.trials == 0:
        about = {"exact_gap": gap, "trials": 0, "finalists_mse": [], "won": "the exact solution"}
        return Decision(problem.choices(exact), about)
    start = repaired(problem, exact, settings.vectors)
    study = Study(
        problem,
        generations,
        plan.split.search,
        settings.storage or journal(str(folder / "study.journal"), alone=True),  # the search has locked the folder
        study_name(settings, plan),
        settings.seed,
        sampler=settings.sampler,
        space=settings.space,
        timeout=settings.timeout,
        starts=() if start is None else (start,),
    )
    with stages.bar(settings.trials, "search trials") as advance:
        for _ in study.finished:
            advance()
        study.run(settings.trials, after_each=advance)
    save_trials(study.rows, folder / TRIALS)
    finalists = stages.track(study.best(_FINALISTS), "confirming on fresh seeds")
    found = confirm(finalists, generations, plan.split.confirm)
    return Decision(found.choices, {"exact_gap": gap, **_study_record(study, found, repaired=start is not None)})


def study_name(settings: Settings, plan: Plan) -> str:
    """The name of the study. A search with more trials, another time limit, memory or storage has the same name and
    continues it."""
    asked = {name: value for name, value in identity_of(settings).items() if name not in (*EXTENDABLE, "storage")}
    return settings_key({**asked, "weights": plan.source.everything_sha256})


def _study_record(study: Study, found: Confirmed, repaired: bool) -> dict[str, Any]:
    origin = study.origin(found.choices)
    return {
        "trials": len(study.finished),
        "finalists_mse": [float(f"{error:.5g}") for error in found.error],
        "won": "the repaired solution" if repaired and origin == "start 1" else origin,
        "best_of_study_held": found.held,
    }


def in_words(about: str | Mapping[str, Any]) -> str:
    """How a policy was chosen, and whether fresh seeds agreed. `about` is a decision's record from the policy file."""
    if isinstance(about, str):
        return about
    if "target" in about:
        return f"the smallest policy with {about['target']}; on fresh seeds it has {about['fresh_seeds']}"
    if not about.get("trials"):
        return str(about["won"])
    best = f"the best of {about['trials']} trials"
    if about["best_of_study_held"]:
        return f"{about['won']}, {best}; confirmed on fresh seeds"
    return f"{about['won']}; {best} was worse on fresh seeds"


def reaching_target(
    settings: Settings, plan: Plan, problem: Problem, generations: Generations, stages: Stages
) -> Decision:
    """The smallest policy whose images reach the requested quality, on the search samples and on fresh seeds.

    Raises:
        BitPolicyError: no policy does, or the quality cannot be measured here.
    """
    measure, asked, unit = _quality(settings, plan, generations)
    with stages.bar(MEASUREMENTS + 1, "policies measured") as advance:

        def measured(choices: Mapping[str, Choice], samples: tuple[Sample, ...]) -> float:
            quality = measure(choices, samples)
            advance()
            return quality

        return _smallest(plan, problem, measured, asked, unit, stages)


def _smallest(
    plan: Plan, problem: Problem, measure: Measure, asked: float, unit: Callable[[float], str], stages: Stages
) -> Decision:
    """The smallest policy that reaches `asked`. If it falls short on fresh seeds, the target is raised and the search
    repeated."""
    most = problem.solve(budget=problem.smallest).error
    search = Reach(
        problem.smallest_within,
        lambda solution: measure(problem.choices(solution), plan.split.search),
        most,
        most * _SMALLEST_ERROR,
    )
    target = asked
    for _ in range(_TIGHTER):
        found = _reached(search, target, problem, unit)
        fresh = measure(problem.choices(found.solution), plan.split.confirm)
        if fresh >= asked:
            break
        target = max(target, found.quality) + 1.1 * (asked - fresh)
    if fresh < asked:
        stages.warn(f"on fresh seeds the policy has {unit(fresh)}, short of the requested {unit(asked)}")
    about: dict[str, Any] = {"target": unit(asked), "policies_measured": len(search.measured)}
    about |= {"search_samples": unit(found.quality), "fresh_seeds": unit(fresh), "held": fresh >= asked}
    return Decision(problem.choices(found.solution), about)


def _reached(search: Reach, target: float, problem: Problem, unit: Callable[[float], str]) -> Measured:
    found = search.smallest(target)
    if found is None:
        names = ", ".join(format.name for format in problem.formats)
        best = max(m.quality for m in search.measured)
        raise BitPolicyError(
            f"no policy reaches {unit(target)}: the most accurate with {names} has {unit(best)}; ask for less"
        )
    return found


Measure = Callable[[Mapping[str, Choice], tuple[Sample, ...]], float]


def _quality(settings: Settings, plan: Plan, generations: Generations) -> tuple[Measure, float, Callable[[float], str]]:
    """How to measure the quality, the target, and how to print such a number; larger is better."""
    if settings.target_psnr is not None:
        return (
            lambda choices, samples: mean_db(generations, choices, samples),
            settings.target_psnr,
            lambda db: f"{db:.2f} dB",
        )
    networks = networks_of(settings, plan)
    if settings.target_lpips is None or settings.target_lpips <= 0:
        raise BitPolicyError(f"--target-lpips {settings.target_lpips} is not a distance; give one above 0, e.g. 0.01")

    def measure(choices: Mapping[str, Choice], samples: tuple[Sample, ...]) -> float:
        references = generations.references(samples)
        found = perceptual_distance(references, generations.images(choices, samples), networks)
        if isinstance(found, Unavailable):
            raise BitPolicyError(f"--target-lpips cannot be measured: {found.reason}; {found.remedy}")
        return -10 * math.log10(max(sum(found.finite) / len(found.per_image), _IDENTICAL))

    return measure, -10 * math.log10(settings.target_lpips), lambda value: f"LPIPS {10 ** (-value / 10):.4g}"


def networks_of(settings: Settings, plan: Plan) -> Networks:
    """The networks that measure quality for this run's pipeline."""
    features = None if settings.features is None else Path(settings.features)
    return networks_for(settings.model, plan.bundled, features, plan.source)


def networks_for(model: str | None, bundled: bool, features: Path | None, source: Source) -> Networks:
    """The networks in `features`, or in the folder that the pipeline came from."""
    folder = BUNDLED_FOLDER if bundled else Path(str(model)).expanduser()
    return Networks(features, folder, source.pipe._execution_device)


def mean_db(generations: Generations, choices: Mapping[str, Choice], samples: Sequence[Sample]) -> float:
    """PSNR of a policy's images, mean over images, in dB."""
    errors = list(generations.errors(choices, samples))
    return sum(-10 * math.log10(max(error, _IDENTICAL)) for error in errors) / len(errors)
