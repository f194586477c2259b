"""Every pipeline class that can be built at toy size, from its layers to the command line.

Not part of the default run: `pytest -m every_pipeline`. One family: `pytest -m every_pipeline -k Flux`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import stages
from toy_pipelines import EVERY


@pytest.mark.every_pipeline
@pytest.mark.parametrize("name", EVERY)
def test_every_stage_passes_or_is_refused_for_the_known_reason(name: str, tmp_path: Path) -> None:
    toy = EVERY[name]
    outcomes = stages.run(toy, tmp_path)
    refused = [line for line in outcomes.values() if line != stages.PASS]
    if toy.refused:
        assert len(refused) == 1, outcomes
        assert toy.refused in refused[0]
    else:
        assert outcomes == dict.fromkeys(stages.STAGES, stages.PASS)
