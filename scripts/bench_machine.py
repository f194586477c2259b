"""Shared by the kernel benchmarks: the clock, the spread of times, and an anonymous description of the machine."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

_KEPT = ("Architecture", "Model name", "CPU(s)", "L1d cache", "L2 cache", "L3 cache", "Flags")
_REPORTED = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")


def clock(threads: int) -> Callable[[], float]:
    """The clock: for one thread its CPU time, which other processes do not lengthen, otherwise wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def spread(times: Sequence[float]) -> float:
    """Half the interquartile range of the times, relative to their median."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / median(ordered)


def description(threads: int) -> dict[str, Any]:
    """The machine and the versions that a figure depends on."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "threads": threads}
    facts["clock"] = "CPU time of the thread" if threads == 1 else "wall"
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return {**facts, **_lscpu()}


def _lscpu() -> dict[str, str]:
    try:
        text = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"Model name": platform.processor()}
    pairs = (line.partition(":")[::2] for line in text.splitlines())
    found = {name.strip(): value.strip() for name, value in pairs if name.strip() in _KEPT}
    flags = found.pop("Flags", "").split()
    return {**found, "vectors": " ".join(flag for flag in _REPORTED if flag in flags)}
