"""The implementation of `search-policy`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitpolicy.cli.running.dry_run import described, print_plan
from bitpolicy.cli.running.results import print_json, print_result
from bitpolicy.cli.running.settings import settings_of
from bitpolicy.output_folder import OutputFolder
from bitpolicy.search.study.samplers import require_sampler
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.settings import Settings
from bitpolicy.workflow.forecast import Forecast
from bitpolicy.workflow.plan import Plan, make_plan
from bitpolicy.workflow.preflight import require_disk, require_quality, require_storage
from bitpolicy.workflow.search_run import run_search
from bitpolicy.workflow.transfer import for_transfer


def run(options: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        options: the command's options, by name.
    """
    output_dir, as_json, dry_run = options["output_dir"], options["as_json"], options["dry_run"]
    overwrite, resume = options["overwrite"], options["resume"]
    settings = for_transfer(settings_of(options))
    require_sampler(settings.sampler)
    stages = Stages(options["quiet"] or as_json)
    held = OutputFolder.peek(output_dir, settings, overwrite=overwrite, resume=resume)
    if dry_run:
        with stages.whole_run():
            plan, forecast = _checked(settings, output_dir, stages, dry_run)
            foreseen = {"memory": asdict(forecast.memory()), "disk": asdict(forecast.disk())}
        (print_json if as_json else print_plan)({**described(plan), "seconds": forecast.of_search(), **foreseen})
        return
    if held is None:
        with stages.whole_run():
            plan, forecast = _checked(settings, output_dir, stages, dry_run)
            stages.expect(forecast.of_search())
            with OutputFolder.claimed(output_dir, settings, overwrite=overwrite, resume=resume) as output:
                _say_notices(settings, plan)
                run_search(settings, plan, output, stages)
        held = output.finished()
    elif not options["quiet"]:
        print(
            f"{output_dir} holds this search, finished; here is its result (--no-resume runs it again)", file=sys.stderr
        )
    assert held is not None
    (print_json if as_json else print_result)(held)


def _checked(settings: Settings, output_dir: Path, stages: Stages, dry_run: bool) -> tuple[Plan, Forecast]:
    """The plan and its forecast. Everything that would stop the run later stops it here, before anything is written."""
    with stages.timed("load"):
        plan = make_plan(settings)
        require_quality(settings, plan)
        require_storage(settings.storage, dry_run)
        forecast = Forecast(settings, plan)
        require_disk(output_dir, forecast.disk())
    return plan, forecast


def _say_notices(settings: Settings, plan: Plan) -> None:
    """Print on stderr what the user should know before the work begins."""
    if plan.fits_unquantized and settings.budget is not None:
        print(
            f"{plan.budget.scope.at_fp16}, which fits {plan.budget}: every layer stays FP16",
            file=sys.stderr,
        )
    if not plan.split.by_prompt:
        print(
            "fewer than 8 prompts: calibration, search and held-out images share prompts but have different seeds",
            file=sys.stderr,
        )
