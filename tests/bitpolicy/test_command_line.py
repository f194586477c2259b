"""What every command has: help with the text of every option, a version, completion, and no empty values."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
import typer
from typer.main import get_command

import bitpolicy
from bitpolicy.cli import main
from bitpolicy.cli.running.results import LOADING, print_result
from bitpolicy.cli.running.tables import print_table

COMMANDS = ["search", "probe", "export", "eval", "inspect", "report", "formats"]
ROOT = Path(__file__).resolve().parents[2]


def squeezed(text: str) -> str:
    """The text without white space, frames, and the backticks of markup."""
    return "".join(letter for letter in text if not letter.isspace() and letter not in "│╭╮╰╯─`")


def params_of(name: str) -> list[Any]:
    commands: Any = get_command(main.app)
    return commands.commands[name].params


# Help


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", ["80", "200"])
def test_help_prints_the_text_of_every_option(
    command: Any, monkeypatch: pytest.MonkeyPatch, name: str, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    shown = squeezed(command(name, "--help").out)
    texts = [param.help for param in params_of(name)]
    assert [text for text in texts if squeezed(text) not in shown] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_adds_no_asterisks(command: Any, name: str) -> None:
    written = sum(param.help.count("*") for param in params_of(name))
    assert command(name, "--help").out.count("*") == written


# Version and completion


@pytest.mark.parametrize(
    "line", [("bitpolicy", "--version"), ("search-policy", "--version"), ("bitpolicy", "search", "--version")]
)
def test_commands_print_their_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: Any
) -> None:
    monkeypatch.setattr(sys, "argv", list(line))
    assert main._run(main.app if line[0] == "bitpolicy" else main.search_app, line[0]) == 0
    assert capsys.readouterr().out == f"bitpolicy {bitpolicy.__version__}\n"


@pytest.mark.parametrize(
    ("name", "function", "words", "offered"),
    [
        ("search-policy", "search_policy", "search-policy --target-p", "--target-psnr"),
        ("bitpolicy", "main", "bitpolicy ins", "inspect"),
    ],
)
def test_a_shell_gets_completions(name: str, function: str, words: str, offered: str) -> None:
    start = f"import sys; sys.argv = [{name!r}]; from bitpolicy.cli import main; main.{function}()"
    asked = {f"_{name.upper().replace('-', '_')}_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", start], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert offered in done.stdout.split()


@pytest.mark.parametrize("app", [main.app, main.search_app], ids=["bitpolicy", "search-policy"])
def test_both_commands_install_their_completion(app: typer.Typer) -> None:
    options = [option for param in get_command(app).params for option in param.opts]
    assert {"--install-completion", "--show-completion"} <= set(options)


# Empty values


@pytest.mark.parametrize(
    "line",
    [
        ("--budget", "5MB", "--model", ""),
        ("--budget", "5MB", "--output-dir", ""),
        ("--budget", "5MB", "--output-dir="),
        ("--budget", "5MB", "--prompts", ""),
        ("--budget", "5MB", "--config", ""),
        ("--budget", "5MB", "--features", ""),
        ("--budget", "5MB", "--keep", "conv_in=fp16", "--keep", ""),
        ("probe", "--model", ""),
        ("probe", "--output-dir", ""),
        ("eval", ""),
        ("eval", "x", "--picture", ""),
        ("eval", "x", "--real-images", ""),
        ("export", "--policy", "", "--output-dir", "out"),
        ("export", "--policy", "policy.yaml", "--output-dir", ""),
        ("inspect", ""),
        ("report", ""),
        ("report", "x", "--output", ""),
        ("report", "x", "--pictures", ""),
    ],
    ids=" ".join,
)
def test_an_empty_value_is_refused(command: Any, here: Path, line: tuple[str, ...]) -> None:
    name = "search-policy" if line[0].startswith("--") else "bitpolicy"
    before = line[line.index("") - 1] if "" in line else line[-1].rstrip("=")
    option = before if before.startswith("--") else ""
    command(*line).assert_refused(name, "is empty; give a value", option)
    assert list(here.iterdir()) == []


# Tables


def test_a_table_prints_every_name_in_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0." + "x" * 300
    for columns, terminal in (("80", False), ("80", True), ("300", False)):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        table = rich.table.Table("layer", "role", "bytes")
        table.add_row(name, "attention_qkv", "1,234,567")
        print_table(table)
        out = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
        lines = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
        assert "".join(cells[0].strip() for cells in lines) == name
        assert [cells[1].strip() for cells in lines if cells[1].strip()] == ["attention_qkv"]
        assert [cells[2].strip() for cells in lines if cells[2].strip()] == ["1,234,567"]
        assert terminal or len(lines) == 1
        assert not terminal or max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("columns", ["80", "240"])
def test_inspect_and_probe_print_layer_names_in_full(
    command: Any, toy: Path, layer_names: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    shown = command("inspect", toy).out
    assert [name for name in layer_names if name not in shown] == []
    assert "…" not in shown
    line = ("--model", toy, "--probe", "weight", "--num-inference-steps", "2", "--samples", "1", "--quantizer", "rtn")
    assert "…" not in command("probe", *line, "--output-dir", "probe").out


RESULT = {
    "reference_bytes": 1000,
    "output_dir": "out",
    "budget_bytes": 400,
    "policy_bytes": 400,
    "checkpoint_bytes": 400,
    "layers": {"int4": 1},
    "predicted_error": 0.1,
    "psnr_db": {"mean": 45.2, "min": 41.0, "n": 2, "identical": 0},
    "seconds": {},
}


@pytest.mark.parametrize(
    ("error", "psnr", "said", "unsaid"),
    [
        (0.1, None, "no PSNR: --trials 0", "no predicted error"),
        (None, 30.0, "--probe adjoint", "no PSNR"),
        (0.1, 30.0, "frontier.csv", "no P"),
    ],
)
def test_an_empty_column_of_the_curve_is_explained(
    capsys: pytest.CaptureFixture[str], error: float | None, psnr: float | None, said: str, unsaid: str
) -> None:
    print_result({"frontier": [[400, error, psnr], [500, error, psnr]], "reference_bytes": 1000, "output_dir": "out"})
    out = capsys.readouterr().out
    assert said in out
    assert unsaid not in out


def test_a_target_is_printed_as_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    def asked(**more: Any) -> str:
        print_result({**RESULT, **more})
        return next(line for line in capsys.readouterr().out.splitlines() if "asked" in line)

    assert "45 dB" in asked(target="45 dB")
    assert "400" not in asked(target="45 dB")
    assert "400 bytes" in asked()


def test_the_readme_loads_a_checkpoint_as_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    lines = LOADING.format(folder="out/checkpoint").splitlines()
    print_result(RESULT)
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line not in printed] == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line not in readme] == []


# Options


def test_a_search_takes_the_requested_number_of_samples(command: Any, small: tuple[str, ...], here: Path) -> None:
    line = ("--budget", "50%", *small, "--trials", "0", "--samples", "3", "--probe", "weight", "--quantizer", "rtn")
    assert command(*line, "--output-dir", "out", "--json").code == 0
    assert json.loads((here / "out" / "run.json").read_text())["calibration_samples"] == 3


def test_export_prints_json_and_nothing_else(command: Any, finished: Any, toy: Path, here: Path) -> None:
    line = ("export", "--policy", finished.folder / "policy.yaml", "--model", toy, "--json")
    found = command(*line, "--output-dir", "out").result
    nbytes = finished.outcome.result["policy_bytes"]
    assert found == {"bytes": nbytes, "component": "unet", "compute": "exact", "pushed_to": None, "output_dir": "out"}
    assert bitpolicy.load_pipeline("out").unet.dtype == torch.float16
    found = command(*line, "--target", "sdnq", "--requantize", "--output-dir", "sdnq").result
    assert (found["target"], found["output_dir"]) == ("sdnq", "sdnq")
    assert found["bytes"] > 0
    assert {"layer", "from", "to", "weight_error"} == set().union(*found["requantized"]) or not found["requantized"]


def test_a_wrong_shard_size_is_not_called_a_budget(command: Any, finished: Any, toy: Path, here: Path) -> None:
    line = ("export", "--policy", finished.folder / "policy.yaml", "--model", toy, "--output-dir", "out")
    for size in ("many", "45%", "0", "3Gb"):
        outcome = command(*line, "--max-shard-size", size)
        outcome.assert_refused("bitpolicy", "--max-shard-size", "write")
        assert "budget" not in outcome.err
    assert not (here / "out").exists()
