"""Finds the fastest of several kernels for a call by timing them, and stores the result on disk.

Each kernel runs on the call's own input. A kernel whose result differs from the reference is excluded. Of the others
the fastest is chosen, or one that is nearly as fast and needs less memory. A kernel's time is the minimum of several
runs, because other load on the machine only adds to it. Results are stored per call, in one file per machine and set of
library versions, so each call is timed only once.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter, thread_time
from typing import Any

import torch

from bitpolicy.kernels.cache_folder import cache_folder, is_own, keep
from bitpolicy.kernels.kernel import Compute

_REPEATS, _FEWEST = 7, 3
_ENOUGH = 0.05  # seconds to spend on one kernel once it has run _FEWEST times
_THRIFT = 1.05  # how many times the minimum time a kernel that needs less memory may take
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative norm, for reordered sums

Multiply = Callable[[], torch.Tensor]


def fastest(
    call: str, tried: Mapping[str, Multiply], compute: Compute, reference: Multiply, thrifty: Collection[str] = ()
) -> str:
    """The name of the fastest kernel that agrees with the reference; "" if none does.

    Args:
        call: everything that the answer depends on; the key of the stored result.
        tried: kernel name -> function that runs the call with it.
        thrifty: names of the kernels that need less memory.
    """
    kept = _kept()
    found = kept.get(call)
    if found is not None and (found["kernel"] in tried or not found["kernel"]) and set(found["ms"]) >= set(tried):
        return str(found["kernel"])
    expected = reference()
    sound = {
        name: multiply
        for name, multiply in tried.items()
        if multiply is reference or agrees(multiply(), expected, compute)
    }
    times = _times(sound, expected.device)
    best = min(times, key=lambda name: times[name] / (_THRIFT if name in thrifty else 1), default="")
    kept[call] = {
        "kernel": best,
        "ms": {name: round(1e3 * times[name], 4) if name in times else None for name in tried},
    }
    _save(kept)
    return best


def agrees(found: torch.Tensor, expected: torch.Tensor, compute: Compute) -> bool:
    """Whether a result equals the reference: bit for bit, or within the rounding that reordered sums may cause."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    bad = ~torch.isfinite(expected)
    if not torch.equal(bad, ~torch.isfinite(found)):
        return False
    found, expected = found.masked_fill(bad, 0), expected.masked_fill(bad, 0)
    if compute is Compute.EXACT:
        return torch.equal(found, expected)
    difference = (found.double() - expected.double()).norm()
    return bool(difference <= _TOLERANCE[expected.dtype] * expected.double().norm())


def _times(kernels: Mapping[str, Multiply], device: torch.device) -> dict[str, float]:
    """Minimum seconds of each kernel; the kernels take turns."""
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(_REPEATS):
        for name, multiply in kernels.items():
            if len(times[name]) < _FEWEST or sum(times[name]) < _ENOUGH:
                times[name].append(_seconds(multiply, device))
    return {name: min(found) for name, found in times.items()}


def _seconds(multiply: Multiply, device: torch.device) -> float:
    if device.type != "cuda":
        seconds = thread_time if torch.get_num_threads() == 1 else perf_counter  # CPU time if only one thread works
        start = seconds()
        multiply()
        return seconds() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    multiply()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@cache
def _machine() -> dict[str, Any]:
    """What timings depend on."""
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_model_name()}",
        "cuda": cuda,
        **{name: _version(name) for name in ("bitpolicy", "torch", "triton")},
    }


def _model_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


@cache
def _file() -> Any:
    digest = hashlib.sha256(json.dumps(_machine(), sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / f"kernels-{digest}.json"


_memory: dict[str, dict[str, Any]] | None = None


def _kept() -> dict[str, dict[str, Any]]:
    """Call -> result, read from disk once. A damaged file counts as empty."""
    global _memory
    if _memory is None:
        _memory = _read()
    return _memory


def _read() -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(_file().read_text())["fastest"] if is_own(_file()) else {}
        return {str(call): {"kernel": str(x["kernel"]), "ms": dict(x["ms"])} for call, x in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _save(found: dict[str, dict[str, Any]]) -> None:
    """Write the results, together with what other processes have stored in the meantime."""
    content = {"machine": _machine(), "fastest": {**_read(), **found}}
    keep(_file(), json.dumps(content, indent=1, sort_keys=True).encode())


def forget() -> None:
    """Clear the in-memory results, so that the next call reads the disk."""
    global _memory
    _memory = None
    _machine.cache_clear()
    _file.cache_clear()


def times_of(call: str) -> dict[str, float | None]:
    """Kernel name -> milliseconds, None for kernels with a wrong result; empty if the call was never timed."""
    found = _kept().get(call)
    return {} if found is None else dict(found["ms"])
