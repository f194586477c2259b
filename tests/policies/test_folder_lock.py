"""One process at a time writes to a folder; a killed process holds no lock."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_folders import differing, export

from bitpolicy import BitPolicyError
from bitpolicy.policies.storage.folder_lock import locked, working_in


@contextmanager
def another_process(work: Callable[[], object], ready: Path) -> Iterator[int]:
    """Its number, once it has made the file `ready`; killed at the end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        until = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < until:
            time.sleep(0.01)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def hold(lock: Path, folder: Path, ready: Path) -> None:
    with locked(lock, folder):
        ready.touch()
        time.sleep(600)


def test_the_error_for_the_second_process_names_the_owner(tmp_path: Path) -> None:
    lock, folder, ready = tmp_path / "lock", tmp_path / "folder", tmp_path / "ready"
    with (
        another_process(lambda: hold(lock, folder, ready), ready) as owner,
        pytest.raises(BitPolicyError, match=f"{folder} is being written by process {owner};.*another --output-dir"),
        locked(lock, folder),
    ):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    lock, folder, ready = tmp_path / "lock", tmp_path / "folder", tmp_path / "ready"
    with another_process(lambda: hold(lock, folder, ready), ready):
        pass
    assert lock.exists()
    with locked(lock, folder):
        pass
    assert not lock.exists()


def test_a_lock_file_that_was_removed_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner removed the file after we opened it: our lock is on a removed file, so we start over."""
    lock, folder, opened = tmp_path / "lock", tmp_path / "folder", os.open
    removed = iter([True, False])

    def removed_at_once(path: Any, *arguments: Any) -> int:
        descriptor = opened(path, *arguments)
        if path == lock and next(removed):
            lock.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", removed_at_once)
    with locked(lock, folder):
        assert lock.exists()


def test_a_folder_that_was_removed_in_the_meantime_is_an_error(tmp_path: Path) -> None:
    """Otherwise a folder with only some of its files would pass as complete."""

    def removed_and_made_anew() -> None:
        with working_in(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").mkdir()

    with pytest.raises(BitPolicyError, match="was removed while it was being written"):
        removed_and_made_anew()


def test_an_error_inside_is_the_error(tmp_path: Path) -> None:
    def fails() -> None:
        with working_in(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")
            raise KeyError

    with pytest.raises(KeyError):
        fails()


def test_two_exports_into_one_folder_leave_a_whole_one(
    exported: Any, saved: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = saved(torch.float32), tmp_path / "here" / "out"
    export(exported, source, tmp_path / "expected")
    for _ in range(4):
        children = []
        for _ in range(2):
            child = os.fork()
            if child == 0:
                code = 3
                try:
                    for _ in range(3):
                        export(exported, source, out)
                    code = 0
                except BitPolicyError as error:
                    code = 2 if "is being written by process" in str(error) else 3
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert set(codes) <= {0, 2}
        assert 0 in codes
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert differing(out, tmp_path / "expected") == []
