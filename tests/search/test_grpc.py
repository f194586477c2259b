"""Two processes work on one study through Optuna's gRPC proxy, which has the only connection to the database."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("grpc") is None:
    pytest.skip("needs gRPC: pip install 'bitpolicy[grpc]'", allow_module_level=True)

# The command that docs/studies.md recommends, with SQLite: database, port.
PROXY = """
import sys
from optuna.storages import get_storage, run_grpc_proxy_server

run_grpc_proxy_server(get_storage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


@pytest.fixture
def proxy(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[str]:
    """The URL of a running proxy."""
    port = free_port()
    line = [sys.executable, "-c", PROXY, f"sqlite:///{tmp_path}/studies.db", str(port)]
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not _answers(port):
            if server.poll() is not None:
                assert server.stderr is not None
                pytest.fail(server.stderr.read()[-3000:])
            assert time.monotonic() < end
            time.sleep(0.1)
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.kill()
        server.communicate()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_two_processes_share_a_proxy(share: Callable[[str], None], proxy: str) -> None:
    share(proxy)
