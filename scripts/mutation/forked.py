"""Runs pytest in forks of a process that has imported the libraries, but nothing of the project.

Importing torch, diffusers and transformers takes seconds, a fork milliseconds. Each child imports the project anew, so
that it can be given one changed file: an import hook compiles the changed text in place of the file, which stays as it
is. The child tells the parent in lines of JSON, through a pipe, which test it starts. A child that has nothing to tell
for too long is killed, together with all that it started.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

Message = dict[str, Any]
Send = Callable[[Message], None]

_MORE_MEMORY = 8 * 1024**3  # bytes a child may map beyond its parent's
_PATIENCE = 15.0
_PARENT_DIED = 1  # PR_SET_PDEATHSIG in linux/prctl.h
_UNFORKABLE = ("grpc", "psycopg")  # their threads or connections do not survive a fork


def preload(names: Sequence[str]) -> None:
    """Import libraries into this process. One that cannot be imported is left to the children."""
    for name in names:
        if not name.startswith(_UNFORKABLE):
            with contextlib.suppress(ImportError, AttributeError, RuntimeError, ValueError):
                importlib.import_module(name)


def libraries(root: Path) -> list[str]:
    """The modules imported so far whose files are not below `root`, in the order of their import."""
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    return [name for name, file in files.items() if file and root not in Path(file).parents and name != "__main__"]


def forked(work: Callable[[Send], None], wait: float) -> Iterator[Message]:
    """What a child says that runs `work(send)`: the messages that it sends, then one with its `end`.

    Args:
        wait: CPU seconds without a message after which the child is killed. A message may hold another `wait`. A child
            that sleeps is killed after `_PATIENCE` times as many seconds.

    Yields:
        messages. The last one has the key `end`: "done", "hang", "died", or the traceback of an exception.
    """
    folder = tempfile.mkdtemp(prefix="mutate-")
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        _live(work, write, folder)
    os.close(write)
    try:
        unread, cpu, since = b"", 0.0, time.monotonic()
        while True:
            if not select.select([read], [], [], 0.5)[0]:
                if _cpu_seconds(child) > cpu + wait or time.monotonic() > since + _PATIENCE * wait:
                    yield {"end": "hang"}
                    return
                continue
            part = os.read(read, 1 << 20)
            if not part:
                yield {"end": "died"}
                return
            cpu, since = _cpu_seconds(child), time.monotonic()
            *lines, unread = (unread + part).split(b"\n")
            for message in map(json.loads, lines):
                wait = message.get("wait", wait)
                yield message
                if "end" in message:
                    return
    finally:
        os.close(read)
        for kill in (os.killpg, os.kill):  # all of its group, and itself if it had not begun one
            with contextlib.suppress(ProcessLookupError):
                kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        shutil.rmtree(folder, ignore_errors=True)


def _cpu_seconds(process: int) -> float:
    """Of a process and of those that it has waited for."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _live(work: Callable[[Send], None], write: int, folder: str) -> None:
    """Run `work` in the child, in a process group of its own, with its temporary files in `folder`. Never returns."""

    def send(message: Message) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(write, line) :]

    end = "done"
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + _MORE_MEMORY, resource.RLIM_INFINITY))
        log = os.open(os.path.join(folder, "log"), os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        work(send)
    except BaseException:  # noqa: BLE001, whatever it is, the parent hears of it
        end = traceback.format_exc()
    finally:
        send({"end": end})
        os._exit(0)


def run_pytest(root: Path, files: Sequence[str], plugin: object) -> int:
    """Run test files of the tree `root` in this process, with the tree's own settings but without workers.

    Args:
        files: paths relative to `root`.
        plugin: an object with pytest's hooks.

    Returns:
        pytest's exit code.
    """
    import pytest

    # tests/conftest.py gives every process a new cache of compiled kernels, except to workers of pytest-xdist.
    os.environ["PYTEST_XDIST_WORKER"] = "gw0"
    os.environ["BITPOLICY_CACHE"] = str(root / "build" / "mutation-kernels")
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.path.join(tempfile.gettempdir(), "hypothesis")
    os.chdir(root)
    sys.path.insert(0, str(root))
    options = ["-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:xdist", "-q"]
    seed = ["--hypothesis-seed=0"] if importlib.util.find_spec("hypothesis") else []
    return int(pytest.main([*options, *seed, "--rootdir", str(root), *files], plugins=[plugin]))


class Changed(importlib.abc.MetaPathFinder):
    """An import hook that compiles another text in place of one module's file.

    Args:
        module: the module's full name.
        path: its file, which tracebacks name.
    """

    def __init__(self, module: str, path: Path, text: str) -> None:
        self.module, self.path, self.text = module, path, text

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        loader = _Loader(fullname, str(self.path), self.text)
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, text: str) -> None:
        super().__init__(fullname, path)
        self._text = text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._text, self.path, "exec", dont_inherit=True)
