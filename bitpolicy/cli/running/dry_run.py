"""What `--dry-run` prints: the plan of a search, and the time, memory and disk it would take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitpolicy.policies.components import to_text
from bitpolicy.search.budget import decimal, readable
from bitpolicy.sensitivity.cost.progress import in_words
from bitpolicy.sensitivity.samples import fingerprint
from bitpolicy.workflow.plan import Plan

_BOUNDS = ("search trials", "re-measuring", "policies measured")  # stages that stop early if they can


def described(plan: Plan) -> dict[str, Any]:
    """The plan as JSON."""
    parts = plan.split
    return {
        "model": plan.model,
        "component": to_text(plan.source.components),
        "layers": len(plan.layers),
        "parameters": plan.account.parameters,
        "reference_bytes": plan.account.reference,
        "budget": str(plan.budget),
        "budget_bytes": plan.budget.total,
        "smallest_bytes": plan.smallest,
        "formats": [format.name for format in plan.formats],
        "call": fingerprint(plan.trajectories.call),
        "samples": {
            "calibration": len(parts.calibration),
            "search": len(parts.search),
            "confirm": len(parts.confirm),
            "held out": len(parts.held_out),
        },
    }


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print the plan for people, with what it would take."""
    reference = plan["reference_bytes"]
    print(f"model       {plan['model']}, '{plan['component']}', {plan['layers']} layers")
    print(f"FP16        {reference:,} bytes ({readable(reference)}), {plan['parameters']:,} parameters")
    print(f"budget      {plan['budget']}")
    print(f"smallest    {plan['smallest_bytes']:,} bytes with {', '.join(plan['formats'])}")
    print(f"call        {plan['call']}")
    print(f"samples     {', '.join(f'{count} {name}' for name, count in plan['samples'].items())}")
    for line in _costs(plan):
        print(line)
    print("dry run: nothing was written")


def _costs(plan: Mapping[str, Any]) -> list[str]:
    seconds, memory, disk = plan["seconds"], plan["memory"], plan["disk"]
    stages = (
        f"{name} {'at most ' if name in _BOUNDS else ''}{in_words(each)}" for name, each in seconds.items() if each >= 1
    )
    rounding = f", or {decimal(memory['rounding'])} while layers are rounded" if memory["rounding"] else ""
    most = memory["weights"] + max(memory["probe"] + memory["sums"], memory["rounding"])
    sums = f" and {decimal(memory['sums'])} for its sums (--probe-memory)" if memory["sums"] else ""
    return [
        f"time        about {in_words(sum(seconds.values()))}: {', '.join(stages)}",
        f"memory      {decimal(most)}: {decimal(memory['weights'])} for the models, plus "
        f"{decimal(memory['probe'])} during a step{sums}{rounding}",
        f"disk        up to {decimal(disk['checkpoint'] + disk['work'])}: {decimal(disk['checkpoint'])} for the "
        f"checkpoint, {decimal(disk['work'])} in work/",
    ]
