"""Run the command line in warm processes, forked from this one after all imports.

A fresh interpreter takes seconds to import torch and diffusers. A fork starts at once and runs the same code. This
process itself must never compute anything, because threads do not survive a fork.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

_PR_SET_PDEATHSIG = 1  # of prctl(2)
BUG = 70  # exit code of a command that raised (EX_SOFTWARE in sysexits)


@dataclass(frozen=True)
class Finished:
    """A finished command. A negative code is the signal that killed it; None means that it never ended."""

    arguments: tuple[str, ...]
    code: int | None
    out: str
    err: str

    def require(self) -> Finished:
        """Raises:
        RuntimeError: the command failed.
        """
        if self.code != 0:
            raise RuntimeError(f"{' '.join(self.arguments)}: exit code {self.code}\n{self.err[-3000:]}")
        return self

    @property
    def complaint(self) -> str | None:
        """What is wrong with how it ended, unless it succeeded or reported a mistake in one line."""
        lines = [line for line in self.err.splitlines() if line.startswith(("bitpolicy:", "search-policy:"))]
        if self.code is None:
            return "it hangs"
        if self.code < 0:
            return f"it died of signal {-self.code}"
        if self.code == 2 and len(lines) == 1 and len(lines[0]) > 20 and not self.out and "Traceback" not in self.err:
            return None
        return None if self.code == 0 else f"exit code {self.code}: {self.err.strip()[-1500:]}"


@dataclass
class Running:
    """A command that was started."""

    arguments: tuple[str, ...]
    pid: int
    _out: IO[bytes]
    _err: IO[bytes]
    _ended: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._ended = os.waitstatus_to_exitcode(status) if pid else None
        return self._ended

    def wait(self, patience: float) -> Finished:
        """Wait for its end. After `patience` seconds it is killed, and its code is None."""
        end, hung = time.monotonic() + patient(patience), False
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                hung = True
                break
            time.sleep(0.002)
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Finished(self.arguments, None if hung else self._ended, *texts)

    def kill(self) -> None:
        """Send SIGKILL to it and everything that it started."""
        if self.poll() is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not created its process group yet
                os.kill(self.pid, signal.SIGKILL)
            self._ended = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def start(
    arguments: Sequence[str], run: Callable[[], Any] | None = None, first: Callable[[], Any] | None = None
) -> Running:
    """Start a command line, or `run`, in a fork of this process, which calls `first` before it."""
    out, err = TemporaryFile(), TemporaryFile()  # noqa: SIM115 - closed by `wait`
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Running(tuple(arguments), pid, out, err)
    code = BUG
    try:
        alone()
        for file, descriptor in ((out, 1), (err, 2)):
            os.dup2(file.fileno(), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if first is not None:
            first()
        code = _called(run) if run is not None else _commanded(arguments)
    except BaseException:  # noqa: BLE001 - any exception is reported to the parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _called(run: Callable[[], Any]) -> int:
    run()
    return 0


def _commanded(arguments: Sequence[str]) -> int:
    from bitpolicy.cli import main

    sys.argv = ["bitpolicy", *arguments]
    try:
        main.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def start_fresh(arguments: Sequence[str]) -> Running:
    """Start a command line in its own interpreter, as a user's shell does."""
    out, err = TemporaryFile(), TemporaryFile()  # noqa: SIM115
    line = [sys.executable, "-m", "bitpolicy", *arguments]
    process = subprocess.Popen(line, stdout=out, stderr=err, start_new_session=True)
    process.returncode = 0  # `Running` waits for it, not subprocess
    return Running(tuple(arguments), process.pid, out, err)


def command(arguments: Sequence[str], patience: float = 120, **how: Any) -> Finished:
    """Run a command to its end."""
    return start(arguments, **how).wait(patience)


def warm_up() -> None:
    """Import what the commands import, on one thread."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
    import torch

    torch.set_num_threads(1)
    import diffusers
    import scipy.optimize  # noqa: F401
    import transformers

    import bitpolicy.cli.main
    import bitpolicy.report.document  # noqa: F401

    for name in ("StableDiffusionPipeline", "UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler"):
        getattr(diffusers, name)  # imported on first access
    for name in ("CLIPTextModel", "CLIPTextConfig", "CLIPTokenizer"):
        getattr(transformers, name)


def patient(seconds: float) -> float:
    """Time limit under the current load for something that takes at most `seconds` on an idle machine."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def alone() -> None:
    """Start a new process group, which can be killed as a whole and ends when this script ends."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def read_all(descriptor: int, patience: float) -> bytes | None:
    """Everything written to a pipe until it is closed; None if that takes longer than `patience` seconds."""
    end, found = time.monotonic() + patient(patience), b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        part = os.read(descriptor, 1 << 16)
        if not part:
            return found
        found += part


def files_in(folder: Path) -> dict[str, bytes]:
    """Relative path -> content; follows links."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
