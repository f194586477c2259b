"""Two processes at one study in a PostgreSQL server of the test's own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from bitpolicy.search.study import open_storage

if importlib.util.find_spec("psycopg") is None:
    pytest.skip("needs a driver: pip install 'psycopg[binary]'", allow_module_level=True)


def program(name: str) -> str:
    """Where a program of the server lies: Debian keeps them off the PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = next((str(folder / name) for folder in folders if (folder / name).exists()), shutil.which(name))
    if found is None:
        pytest.skip(f"needs PostgreSQL's {name}")
    return found


def as_user() -> tuple[str, ...]:
    """PostgreSQL refuses to be run by root; what is put before a command to run it as somebody else."""
    if os.getuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL refuses to be run by root, and there is no setpriv to be somebody else")
    return ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The URL of an empty database; its server is stopped and its files are removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))  # not pytest's, which only its owner may enter
    user = as_user()
    if user:
        os.chown(folder, 65534, 65534)
    run: dict[str, Any] = {"check": True, "capture_output": True, "timeout": 120, "cwd": folder}
    data, control = str(folder / "data"), program("pg_ctl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    try:
        subprocess.run([*user, program("initdb"), "-D", data, "-U", "bitpolicy", "-A", "trust"], **run)
        log = {**run, "capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*user, control, "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start"], **log)
        yield f"postgresql+psycopg://bitpolicy@127.0.0.1:{port}/postgres"
        subprocess.run([*user, control, "-D", data, "-m", "immediate", "stop"], **run)
    finally:
        shutil.rmtree(folder)


def test_two_processes_share_a_database_that_was_empty(
    new_workers: Callable[..., list[subprocess.Popen[str]]], database: str
) -> None:
    outputs = []
    for worker in new_workers(database, count=2, trials=12):
        out, err = worker.communicate(timeout=200)
        assert worker.returncode == 0, err[-3000:]
        outputs.append(out.split())
    study = optuna.load_study(study_name="s", storage=open_storage(database))
    finished = study.get_trials(states=(TrialState.COMPLETE,))
    assert len(study.trials) == len(finished)
    assert 12 <= len(finished) <= 13  # both may begin the last one
    assert len(Counter(trial.user_attrs["worker"] for trial in finished)) == 2
    assert sorted(trial.user_attrs["turn"] for trial in finished) == list(range(len(finished)))
    assert outputs[0] == outputs[1]
    assert outputs[0][1] == str(len(finished))
