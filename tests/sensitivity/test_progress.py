"""Stages: seconds by name, and no bar where nobody looks."""

from __future__ import annotations

import time

import pytest

from bitpolicy.sensitivity.progress import Stages


def test_seconds_of_a_stage_add_up() -> None:
    stages = Stages(quiet=True)
    for _ in range(2):
        with stages.timed("probe"):
            time.sleep(0.02)
    with stages.timed("search"):
        pass
    assert list(stages.seconds) == ["probe", "search"]
    assert stages.seconds["probe"] >= 0.04 > stages.seconds["search"]


def test_a_stage_that_is_interrupted_is_timed_too() -> None:
    stages = Stages(quiet=True)
    with pytest.raises(KeyboardInterrupt), stages.timed("probe"):
        raise KeyboardInterrupt
    assert "probe" in stages.seconds


@pytest.mark.parametrize("quiet", [True, False])
def test_no_bar_is_drawn_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str], quiet: bool) -> None:
    assert list(Stages(quiet).track(["a", "b"], "work")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
