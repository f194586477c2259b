"""A toy pipeline in a folder, the commands run in this process, and one finished search that no test may change."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from bitpolicy.cli import main
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import to_storage

PROMPTS = "cat dog pizza heart star moon tree ball".split()


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command line."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object that stdout must consist of."""
        (line,) = self.out.splitlines()
        return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))

    def assert_refused(self, command: str, *needles: str) -> None:
        """Check for exit code 2, nothing on stdout, and one line on stderr that contains all `needles`."""
        assert (self.code, self.out) == (2, "")
        (line,) = self.err.splitlines()
        assert line.startswith(f"{command}: ")
        assert [needle for needle in needles if needle not in line] == []


Command = Callable[..., Outcome]


@pytest.fixture(scope="session")
def command() -> Command:
    """`command("search", "--budget", "5MB")` runs `bitpolicy search`, and without a first word `search-policy`."""

    def run(*arguments: str | Path) -> Outcome:
        sub = arguments and not str(arguments[0]).startswith("--")
        name, app = ("bitpolicy", main.app) if sub else ("search-policy", main.search_app)
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patched, redirect_stdout(out), redirect_stderr(err), _libraries_restored():
            patched.setattr(sys, "argv", [name, *map(str, arguments)])
            code = main._run(app, name)
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@contextmanager
def _libraries_restored() -> Iterator[None]:
    """Commands silence other libraries. This restores them for later tests."""
    loggers = [library.utils.logging for library in (diffusers, transformers)]
    before = [logger.get_verbosity() for logger in loggers]
    with warnings.catch_warnings():
        yield
    for logger, verbosity in zip(loggers, before, strict=True):
        logger.set_verbosity(verbosity)


@pytest.fixture(scope="session")
def process() -> Command:
    """The same in a separate process, after the Python statements `first`; slow to start."""

    def run(*arguments: str | Path, first: str = "") -> Outcome:
        named = "import sys\nsys.argv[0] = 'search-policy'"  # as the installed script is
        code = f"{named}\n{first}\nfrom bitpolicy.cli.main import search_policy\nsearch_policy()"
        line = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def half_pipeline(new_toy_pipeline: Callable[[], Any]) -> Callable[[], Any]:
    """Makes a toy pipeline in float32 with values that float16 can hold, including the VAE and the text encoder."""

    def new() -> Any:
        pipe = new_toy_pipeline()
        for model in (pipe.unet, pipe.vae, pipe.text_encoder):
            to_storage(model, torch.float16)
        return pipe

    return new


@pytest.fixture(scope="session")
def toy(half_pipeline: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that save_pretrained wrote: float16."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    pipe = half_pipeline()
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        torch.nn.Module.to(model, torch.float16)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight prompts, the fewest for which each part gets its own."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small(toy: Path, prompts: Path) -> tuple[str, ...]:
    """The arguments of a search that takes seconds: two steps, no guidance, two trials."""
    call = ("--num-inference-steps", "2", "--guidance-scale", "1")
    return ("--model", str(toy), "--prompts", str(prompts), *call, "--trials", "2")


@dataclass(frozen=True)
class Finished:
    """A finished search: its command line, what it printed, and its folder."""

    arguments: tuple[str, ...]
    outcome: Outcome
    folder: Path


@pytest.fixture(scope="session")
def finished(command: Command, small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Half of FP16, printed as JSON."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    arguments = ("--budget", "50%", *small, "--output-dir", str(folder), "--json")
    return Finished(arguments, command(*arguments), folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def layer_names(half_pipeline: Callable[[], Any]) -> list[str]:
    return [name for name, _ in quantizable_layers(half_pipeline().unet)]
