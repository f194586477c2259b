"""The torture script: its judge detects every kind of failure, and a short run finds none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.usefixtures("scripts_importable"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the cases are forks of one process"),
]
VALUES = {"tensors": "1", "picture": "2"}
# Rows in which only a checkpoint with hashes of its files can detect the damage.
_BY_HASH = ("text encoder", "VAE", "tokenizer", "scheduler", "model_index.json", "denoiser", "all components", "from_")


def refuses() -> dict[str, str]:
    from bitpolicy import BitPolicyError

    raise BitPolicyError("the file has 3 bytes, needed 8; download it again")


def says_nothing() -> dict[str, str]:
    from bitpolicy import BitPolicyError

    raise BitPolicyError("wrong")


def raises() -> dict[str, str]:
    raise ValueError("a traceback for the user, of a page or two")


def waits() -> dict[str, str]:
    time.sleep(600)
    return VALUES


def spins() -> dict[str, str]:
    while True:
        pass


def dies() -> dict[str, str]:
    os.abort()


def leaves() -> dict[str, str]:
    os._exit(3)


def devours() -> dict[str, str]:
    return {"tensors": str(torch.ones(10**13).sum())}


@pytest.mark.parametrize(
    ("operation", "outcome"),
    [
        (lambda: VALUES, "same values"),
        (lambda: {**VALUES, "picture": "3"}, "other values"),
        (lambda: {"tensors": "1"}, "other values"),
        (lambda: {**VALUES, "more": ""}, "other values"),
        (refuses, "refused"),
        (says_nothing, "raw exception"),
        (raises, "raw exception"),
        (waits, "hang"),
        (spins, "hang"),
        (dies, "crash"),
        (leaves, "crash"),
        (devours, "memory"),
    ],
)
def test_the_judge_tells_outcomes_apart(
    operation: Callable[[], dict[str, str]], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ordeals.judge import judged

    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))  # otherwise patience grows with the load
    assert judged(operation, VALUES, patience=5).outcome == outcome


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline without packed layers, which is quick to make."""
    from ordeals.artefacts import toy_pipeline

    folder = tmp_path_factory.mktemp("torture") / "checkpoint"
    toy_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("broken", "outcome"),
    [
        (None, "same values"),
        ("one weight", "other values"),
        ("one setting", "other values"),
        ("one token", "other values"),
        ("a traceback", "raw exception"),
        ("no end", "hang"),
        ("a crash", "crash"),
    ],
)
def test_a_broken_loader_is_caught(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, broken: str | None, outcome: str
) -> None:
    from ordeals.judge import judged
    from ordeals.operations import loaded

    import bitpolicy

    load = bitpolicy.load_pipeline
    expected = json.loads(judged(lambda: loaded(checkpoint), None, patience=60).detail)

    def badly(folder: Path) -> Any:
        pipe = load(folder)
        if broken == "one weight":
            next(pipe.vae.parameters()).data.flatten()[3] += 1e-3
        elif broken == "one setting":
            pipe.scheduler.register_to_config(beta_end=0.013)
        elif broken == "one token":
            pipe.tokenizer.model_max_length = 7
        elif broken == "a traceback":
            raise KeyError("weight")
        elif broken == "no end":
            waits()
        elif broken == "a crash":
            os.abort()
        return pipe

    monkeypatch.setattr(bitpolicy, "load_pipeline", badly)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert judged(lambda: loaded(checkpoint), expected, patience=6 if broken == "no end" else 60).outcome == outcome


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".yaml", ".journal", ".md"])
def test_damage_is_reproducible_and_changes_every_file(tmp_path: Path, suffix: str) -> None:
    from ordeals.damage import damage
    from safetensors.torch import save

    contents = {
        ".safetensors": save({"a": torch.ones(2, 3), "b": torch.zeros(2, 3)}, {"format": "pt"}),
        ".json": b'{"a": [1, 2.5, "x"], "b": {"c": null, "d": true}}',
        ".yaml": b"---\na: int4\nb: {c: 1}\n...\n",
        ".journal": b'{"op": 1}\n{"op": 2}\n',
        ".md": b"some text",
    }
    seen = set()
    for number in range(150):
        kept = []
        for again in ("one", "two"):
            path = tmp_path / again / str(number) / f"file{suffix}"
            path.parent.mkdir(parents=True)
            (path.parent / "beside").write_text("another")
            path.write_bytes(contents[suffix])
            done = damage(path, Random(number))
            kept.append((done, path.read_bytes() if path.is_file() and not path.is_symlink() else None))
            seen.add(done)
            if done != "unreadable" and path.is_file() and not path.is_symlink():
                assert path.read_bytes() != contents[suffix], done
        assert kept[0][0] == kept[1][0]
        if kept[0][0] != "a pickle":  # torch.save writes a varying number into the file
            assert kept[0] == kept[1]
    assert len(seen) > 10


def test_a_tally_resumes_from_its_file(tmp_path: Path) -> None:
    from ordeals.judge import HANG, SAME, Verdict
    from ordeals.tally import Tally

    tally = Tally(7)
    tally.add("files", "policy", Verdict(SAME), {"case": 0})
    assert not tally.failed
    tally.add("files", "policy", Verdict(HANG, "why"), {"case": 1})
    tally.save(tmp_path / "tally.json")
    found = Tally.load(tmp_path / "tally.json", 7)
    assert found == tally
    assert found.failed
    assert found.bad == [
        {"part": "files", "row": "policy", "outcome": "hang", "case": 1, "detail": "why"},
    ]
    assert Tally.load(tmp_path / "tally.json", 8).total == 0
    assert "| policy | 2 |" in found.table()


def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "scripts" / "torture.py"), "--cases", "60", "--kills", "1", "--disks", "1"]
    line += ["--pairs", "1", "--quiet", "--json", str(tmp_path / "found.json"), "--work", str(tmp_path / "work")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1500, check=False)
    assert (tmp_path / "found.json").is_file(), done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["done"] == {"files": 60, "kills": 1, "disks": 1, "pairs": 1}
    bad = found["bad"]
    if not (tmp_path / "work" / "run" / "checkpoint" / "bitpolicy.json").exists():
        bad = [case for case in bad if not case["row"].startswith(_BY_HASH) and "from_pretrained" not in case["row"]]
    assert bad == [], done.stdout[-3000:]
    assert done.returncode == int(bool(found["bad"]))
