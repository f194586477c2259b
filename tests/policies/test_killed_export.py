"""An export that is killed at any moment leaves the old folder or nothing, and the next one succeeds."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from pipeline_folders import differing, export

F32 = torch.float32


@pytest.mark.parametrize("before", ["nothing", "an older export"])
def test_a_killed_export_leaves_the_old_folder_or_nothing(
    exported: Any, saved: Callable[..., Path], tmp_path: Path, before: str
) -> None:
    source, out, draw = saved(F32), tmp_path / "here" / "out", Random(0)
    export(exported, source, tmp_path / "expected")
    start = time.perf_counter()
    export(exported, source, out)
    takes = time.perf_counter() - start
    if before == "nothing":
        shutil.rmtree(out)
    seen = set()
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    export(exported, source, out)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.1, 2.0) * takes)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        names = {path.name for path in out.parent.iterdir()} if out.parent.exists() else set()
        assert names <= {"out", ".out.bitpolicy-partial", ".out.bitpolicy-old", ".out.bitpolicy-lock"}
        seen |= names
        if out.exists():
            assert differing(out, tmp_path / "expected") == []
        elif before == "an older export":  # killed between two renames: the old one is there by its other name
            assert differing(out.parent / ".out.bitpolicy-old", tmp_path / "expected") == []
    assert ".out.bitpolicy-partial" in seen, "no process was killed while it wrote"
    export(exported, source, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert differing(out, tmp_path / "expected") == []
