"""Progress of stages: seconds by name, and no bars if stderr is not a terminal."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from bitpolicy.sensitivity.cost.progress import Stages


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Every frame drawn on a terminal of 120 columns.

    This is not a fixture, because pytest restores its own stderr between a fixture and its test.
    """
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_seconds_of_a_stage_add_up() -> None:
    stages = Stages(quiet=True)
    for _ in range(2):
        with stages.timed("probe"):
            time.sleep(0.02)
    with stages.timed("search"):
        pass
    assert list(stages.seconds) == ["probe", "search"]
    assert stages.seconds["probe"] >= 0.04 > stages.seconds["search"]


def test_an_interrupted_stage_is_timed_as_well() -> None:
    stages = Stages(quiet=True)
    with pytest.raises(KeyboardInterrupt), stages.timed("probe"):
        raise KeyboardInterrupt
    assert "probe" in stages.seconds


@pytest.mark.parametrize("quiet", [True, False])
def test_no_bar_is_drawn_if_stderr_is_not_a_terminal(capsys: pytest.CaptureFixture[str], quiet: bool) -> None:
    assert list(Stages(quiet).track(["a", "b"], "work")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_a_run_shows_its_own_line_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, stages = on_a_terminal(monkeypatch), Stages()
    with stages.whole_run():
        assert "whole run" in terminal.getvalue()
        assert "getting ready" in terminal.getvalue()


def test_a_forecast_adds_the_time_left_and_the_current_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, stages = on_a_terminal(monkeypatch), Stages()
    with stages.whole_run():
        stages.expect({"reference": 600.0, "adjoint probe": 1200.0})
        with stages.bar(2, "reference") as advance:
            advance()
            until = time.monotonic() + 60
            while "17%" not in terminal.getvalue() and time.monotonic() < until:
                time.sleep(0.05)  # rich draws ten times a second, in a thread of its own
            shown = terminal.getvalue()
            assert "17%" in shown  # half of a third
            assert re.search(r"about \d+ min left", shown)
            assert "reference" in shown
            assert "1/2" in shown


def test_a_run_whose_stage_fails_can_be_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, stages = on_a_terminal(monkeypatch), Stages()
    with pytest.raises(KeyError), stages.whole_run(), stages.bar(2, "reference"):
        raise KeyError
    assert list(stages.track(["a"], "work")) == ["a"]
    assert "work" in terminal.getvalue()


def test_a_run_draws_nothing_if_stderr_is_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages()
    with stages.whole_run():
        stages.expect({"work": 1.0})
        assert list(stages.track(["a"], "work")) == ["a"]
    assert capsys.readouterr() == ("", "")
