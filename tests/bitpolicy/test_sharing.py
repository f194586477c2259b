"""The probe in processes of its own: several that share the work, and one that is killed at any moment.

All of them end with the same file, bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitpolicy.sensitivity import workers
from bitpolicy.sensitivity.table_files import read_table

RESULTS = ("sensitivity.safetensors", "sensitivity.csv", "split.safetensors")
PROBE = ("-m", "bitpolicy", "probe", "--quiet")


def arguments(small: Sequence[str], folder: Path) -> list[str]:
    """Three samples with two vectors of their own and two shared ones: parts that three processes cannot share
    evenly."""
    without_trials = list(small)[: list(small).index("--trials")]
    without_trials[without_trials.index("--guidance-scale") + 1] = "9"  # errors large enough to be measured again
    sizes = ("--samples", "3", "--vectors", "2", "--split", "--shared", "2", "--remeasure", "2")
    return [*without_trials, *sizes, "--output-dir", str(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def alone(small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes without a stop."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    subprocess.run([sys.executable, *PROBE, *arguments(small, folder)], check=True, capture_output=True, timeout=200)
    return folder


def launched(processes: int, *command: str) -> list[str]:
    """The command under `accelerate launch`, on its own port; without a GPU, its processes use the CPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    ports = ("--main_process_port", str(random.randint(20000, 40000)))
    settings = ("--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no")
    return [*launcher, *settings, *ports, *command]


def test_two_processes_produce_the_table_of_one(small: tuple[str, ...], alone: Path, tmp_path: Path) -> None:
    line = launched(2, *PROBE, *arguments(small, tmp_path / "out"))
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "out") == contents(alone)
    assert done.stdout.count("all 83 layers") == 1  # one of them speaks
    assert "2 processes" in done.stdout


def test_processes_with_separate_folders_end_with_all_pieces(
    small: tuple[str, ...], alone: Path, tmp_path: Path
) -> None:
    """As on machines that share no disk: each process writes below its rank."""
    code = "import os, sys; sys.argv += ['--output-dir', sys.argv.pop() + '/' + os.environ['RANK']]; "
    script = tmp_path / "ranked.py"
    script.write_text(f"{code}\nfrom bitpolicy.cli.main import main\nmain()\n")
    *rest, _, folder = arguments(small, tmp_path / "out")
    line = launched(2, str(script), "probe", "--quiet", *rest, folder)
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "out" / "0") == contents(alone)
    of_one, of_other = ({p.name: p.read_bytes() for p in (tmp_path / "out" / r / "work").rglob("*.s*")} for r in "01")
    assert of_one == of_other
    assert len(of_one) > 10


def test_a_killed_probe_ends_as_if_it_had_never_stopped(small: tuple[str, ...], alone: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments after the first piece, three times, until a run gets through."""
    draw, kills = random.Random(0), 0
    line = [sys.executable, *PROBE, *arguments(small, tmp_path / "out")]
    while True:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        if kills < 3 and _killed(process, tmp_path / "out", draw):
            kills += 1
            continue
        assert process.wait(timeout=200) == 0
        break
    assert kills > 0
    assert contents(tmp_path / "out") == contents(alone)


def _killed(process: subprocess.Popen[Any], folder: Path, draw: random.Random) -> bool:
    """Wait for one more piece and a moment, then kill; False if it was done by then."""
    before = _pieces(folder)
    while process.poll() is None and _pieces(folder) == before:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.4))
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    return True


def _pieces(folder: Path) -> int:
    return len(list(folder.rglob("*.safetensors")))


def test_the_table_records_the_source_of_each_number(alone: Path) -> None:
    table = read_table(alone / "sensitivity.safetensors")
    assert table.measured is not None
    count = int(table.measured.sum())
    assert 0 < count <= 8
    measured = {table.layers[i] for i, _ in table.measured.nonzero().tolist()}
    lines = (alone / "sensitivity.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in lines if line.endswith(",ablation")} == measured
    assert table.cost is not None
    once = 3 * 2  # samples and calls
    assert (table.cost.reference, table.cost.measured) == (once, count * once)
    assert table.cost.probe == 3 * 2 * (1 + 2 * 3)
    assert table.cost.ablation == once * 83 * 2


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_name_has_one_process(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """Also where there are fewer names than processes: two that make one piece would write the same file."""
    monkeypatch.setattr(workers, "launched", lambda: True)
    for count in range(10):
        names, shared = [str(i) for i in range(count)], []
        for rank in range(processes):
            state = SimpleNamespace(process_index=rank, num_processes=processes)
            monkeypatch.setattr(workers, "_state", lambda state=state: state)
            shared += workers._share(names)
        assert shared == names
