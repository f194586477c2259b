"""A command prints nothing of what libraries say of each other when they are imported; `import bitpolicy` does."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from bitpolicy.command import quiet_if_a_command, runs_a_command

NOISY = '''
import importlib.abc, logging, sys, warnings

class Noisy(importlib.abc.MetaPathFinder):
    """Says something whenever diffusers' quantizers are imported, as torchao does beside some versions of torch."""

    def find_spec(self, name, path, target=None):
        if name == "diffusers.quantizers.auto":
            logging.getLogger("torch.utils._pytree").warning("a line of a logger")
            warnings.warn("a line of a warning")

sys.meta_path.insert(0, Noisy())
'''
LINES = ("a line of a logger", "a line of a warning")


def test_a_command_is_told_by_how_the_process_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ["/usr/bin/bitpolicy", "search-policy", "C:/Scripts/bitpolicy.exe", "/site-packages/bitpolicy/__main__.py"]
    for name in [*ours, "", "-c", "train.py", "/usr/bin/pytest", "/site-packages/pytest/__main__.py"]:
        monkeypatch.setattr(sys, "argv", [name])
        assert runs_a_command() == (name in ours), name
    for module in ("bitpolicy", "pytest"):
        monkeypatch.setattr(sys, "argv", ["-m"])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", module])
        assert runs_a_command() == (module == "bitpolicy")
    monkeypatch.setattr(sys, "argv", [])
    assert not runs_a_command()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("line", "terminal", "shown"),
    [
        (["search-policy", "--budget", "5MB"], True, True),
        (["search-policy", "--budget", "5MB"], False, False),
        (["search-policy", "--help"], True, False),
        (["search-policy", "--budget", "5MB", "--json"], True, False),
        (["train.py"], True, False),
    ],
)
def test_a_command_shows_at_once_that_it_has_begun(
    line: list[str], terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setattr(sys, "stderr", stderr)
    with quiet_if_a_command():
        assert ("loading libraries" in stderr.getvalue()) == shown
    assert stderr.getvalue().endswith("\r\x1b[K") == shown


@pytest.mark.parametrize(
    ("line", "heard"), [(["bitpolicy"], False), (["bitpolicy", "--debug"], True), (["train.py"], True)]
)
def test_afterwards_everything_is_heard_as_before(
    line: list[str], heard: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", line)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with quiet_if_a_command():
            logging.getLogger("some.library").warning("within")
            warnings.warn("within", stacklevel=1)
        logging.getLogger("some.library").warning("after")
        warnings.warn("after", stacklevel=1)
    expected = ["within", "after"] if heard else ["after"]
    assert [record.getMessage() for record in caplog.records] == expected
    assert [str(one.message) for one in warned] == expected


def test_a_mistake_is_one_line_though_libraries_talk_when_imported(process: Any, here: Path) -> None:
    process("--budget", "50%", "--model", "./nothing", first=NOISY).assert_refused("search-policy", "no such folder")


def test_the_module_run_as_a_command_is_as_quiet(here: Path) -> None:
    (here / "noisy.py").write_text(NOISY)
    code = "import runpy, sys; sys.path.insert(0, '.'); import noisy\n"
    code += "sys.argv, sys.orig_argv = ['-m', 'search', '--budget', 'three'], ['python', '-m', 'bitpolicy']\n"
    code += "runpy.run_module('bitpolicy', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr


def test_who_imports_bitpolicy_hears_them(here: Path) -> None:
    line = [sys.executable, "-c", f"{NOISY}\nimport bitpolicy"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert all(line in done.stderr for line in LINES)
