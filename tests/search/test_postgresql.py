"""Two processes work on one study in a PostgreSQL server that the test starts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("psycopg") is None:
    pytest.skip("needs a driver: pip install 'psycopg[binary]'", allow_module_level=True)


def program(name: str) -> str:
    """The path of a server program. Debian does not put them on the PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = next((str(folder / name) for folder in folders if (folder / name).exists()), shutil.which(name))
    if found is None:
        pytest.skip(f"needs PostgreSQL's {name}")
    return found


def as_user() -> tuple[str, ...]:
    """The prefix that runs a command as another user, since PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL refuses to be run by root, and there is no setpriv to be somebody else")
    return ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.fixture(scope="module")
def database(free_port: Callable[[], int]) -> Iterator[str]:
    """The URL of an empty database. At the end its server is stopped and its files are removed."""
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))  # pytest's folder is readable only by its owner
    user = as_user()
    if user:
        os.chown(folder, 65534, 65534)
    run: dict[str, Any] = {"check": True, "capture_output": True, "timeout": 120, "cwd": folder}
    data, control = str(folder / "data"), program("pg_ctl")
    port = free_port()
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    try:
        subprocess.run([*user, program("initdb"), "-D", data, "-U", "bitpolicy", "-A", "trust"], **run)
        log = {**run, "capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*user, control, "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start"], **log)
        yield f"postgresql+psycopg://bitpolicy@127.0.0.1:{port}/postgres"
        subprocess.run([*user, control, "-D", data, "-m", "immediate", "stop"], **run)
    finally:
        shutil.rmtree(folder)


def test_two_processes_share_a_database_that_was_empty(share: Callable[[str], None], database: str) -> None:
    share(database)
