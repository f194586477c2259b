"""A command hides what libraries print about each other when they are imported; `import bitpolicy` does not."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers

from bitpolicy.command import command, importing, in_a_command

NOISY = '''
import importlib.abc, logging, sys, warnings

class Noisy(importlib.abc.MetaPathFinder):
    """Prints something whenever diffusers' quantizers are imported, as torchao does with some versions of torch."""

    def find_spec(self, name, path, target=None):
        if name == "diffusers.quantizers.auto":
            logging.getLogger("torch.utils._pytree").warning("a line of a logger")
            warnings.warn("a line of a warning")

sys.meta_path.insert(0, Noisy())
'''
LINES = ("a line of a logger", "a line of a warning")


def test_only_calls_from_a_command_are_in_a_command() -> None:
    with command():
        assert in_a_command()
    assert not in_a_command()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command silences other libraries permanently; a test must not."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    level = logging.getLogger("torch").level
    with warnings.catch_warnings():
        yield
    logging.getLogger("torch").setLevel(level)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_warning()
        library.utils.logging.enable_progress_bar()


@pytest.mark.parametrize(
    ("options", "terminal", "shown"),
    [({}, True, True), ({}, False, False), ({"as_json": True}, True, False), ({"quiet": True}, True, False)],
)
def test_a_command_shows_at_once_that_it_has_started(
    options: dict[str, bool], terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with importing(options):
        assert ("loading libraries" in stderr.getvalue()) == shown
    assert stderr.getvalue().endswith("\r\x1b[K") == shown


@pytest.mark.parametrize("heard", [False, True])
def test_loggers_work_afterwards_as_before(heard: bool, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with importing({"debug": heard}):
            logging.getLogger("some.library").warning("within")
            warnings.warn("within", stacklevel=1)
        logging.getLogger("some.library").warning("after")
    assert [record.getMessage() for record in caplog.records] == (["within", "after"] if heard else ["after"])
    assert [str(one.message) for one in warned] == (["within"] if heard else [])


@pytest.mark.parametrize("line", [["search-policy", "--help"], ["bitpolicy", "--version"], ["bitpolicy", "exprot"]])
def test_commands_without_a_model_import_no_slow_library(line: list[str]) -> None:
    code = f"""import sys
sys.argv = {line!r}
from bitpolicy.cli import main
try:
    main.{"search_policy" if line[0] == "search-policy" else "main"}()
finally:
    print(sorted({{"torch", "diffusers", "transformers", "scipy", "matplotlib", "optuna"}} & sys.modules.keys()))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("[]\n"), done.stdout


def test_a_mistake_is_one_line_even_if_libraries_print_on_import(process: Any, here: Path) -> None:
    process("--budget", "50%", "--model", "./nothing", first=NOISY).assert_refused("search-policy", "no such folder")


def test_running_the_module_is_as_quiet(here: Path) -> None:
    (here / "noisy.py").write_text(NOISY)
    code = "import runpy, sys; sys.path.insert(0, '.'); import noisy\n"
    code += "sys.argv, sys.orig_argv = ['-m', 'search', '--budget', 'three'], ['python', '-m', 'bitpolicy']\n"
    code += "runpy.run_module('bitpolicy', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr


def test_importing_bitpolicy_in_python_shows_them(here: Path) -> None:
    line = [sys.executable, "-c", f"{NOISY}\nimport bitpolicy\nbitpolicy.search"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert all(line in done.stderr for line in LINES)
